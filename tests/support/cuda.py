"""Stand-ins for `torch.cuda` streams, graphs and events on a CPU, for tests without a GPU.

They follow torch 2.13's Python sources (`torch/cuda/graphs.py`, `torch/cuda/streams.py`). Arguments are bound to the
real signature of `torch.cuda.graph`, and a graph can be replayed only after its capture. As on a GPU, a replay computes
the captured operations again with the current values of the input tensors.
"""

from __future__ import annotations

import contextlib
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Stream:
    """A stream that records its priority and runs work immediately."""

    made: int = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        Stream.made += 1
        self.priority = priority

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.enable_timing, self.blocking = enable_timing, blocking
        self.recorded = False

    def record(self, stream: Stream | None = None) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded, "this event was never recorded"

    def query(self) -> bool:
        return self.recorded

    def elapsed_time(self, end: Event) -> float:
        assert self.enable_timing
        assert end.enable_timing
        return 1.0


class _Recorder(TorchDispatchMode):
    """Records every operation with its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class CUDAGraph:
    """A graph whose kernels keep the priority of the stream on which they were captured, as in torch."""

    def __init__(self) -> None:
        self.compute: Callable[[], None] | None = None
        self.num_replays = 0
        self.priority: int

    def replay(self) -> None:
        assert self.compute is not None, "this graph was never captured"
        self.num_replays += 1
        self.compute()


def _replay(calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
    """Run recorded operations again; write each result to its original tensor."""
    for func, args, kwargs, out in calls:
        again = func(*args, **kwargs)
        for old, new in zip(_tensors(out), _tensors(again), strict=True):
            if old is not new and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                old.copy_(new)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def _set_sync_debug_mode(mode: str) -> None:
    """Warn as `torch._C._cuda_set_sync_debug_mode` does."""
    warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)


class FakeCuda:
    """Replaces the parts of `torch.cuda` that `cuda_graphs` and `host_device` use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.default_stream = Stream()
        Stream.made = 0
        graph_signature = inspect.signature(torch.cuda.graph.__init__)

        @contextlib.contextmanager
        def stream(stream: Stream) -> Iterator[None]:
            yield

        @contextlib.contextmanager
        def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
            bound = graph_signature.bind(None, *args, **kwargs).arguments
            recorder = _Recorder()
            with recorder:
                yield
            bound["cuda_graph"].compute = types.MethodType(_replay, recorder.calls)
            bound["cuda_graph"].priority = bound["stream"].priority

        for name, double in {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "stream": stream,
            "graph": graph,
            "current_stream": lambda device=None: self.default_stream,
            "set_stream": lambda stream: None,
            "synchronize": lambda device=None: None,
            "graph_pool_handle": lambda: (0, 1),
            "set_sync_debug_mode": _set_sync_debug_mode,
            "current_device": lambda: 0,
            "_sleep": lambda cycles: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, double)
