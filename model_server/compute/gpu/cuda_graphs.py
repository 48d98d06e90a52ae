"""CUDA graphs of the decode step: captures a step of each batch size once and replays it with one launch.

A decode step of a 7B model has about 600 kernels, and Python launches them more slowly than a GPU runs them. Steps with
prefill run without graphs: they are long, and their shapes differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model_server.compute.decoder import Decoder
from model_server.compute.gpu.host_device import on_host, to_device
from model_server.compute.gpu.streams import HIGH_PRIORITY
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache, ContiguousStep, StepMetadata


def batch_sizes(max_batch_size: int) -> list[int]:
    """Return the batch sizes that get a graph; a step is padded to the next larger size.

    The sizes grow by 8 up to 64, by 16 up to 128, and by 32 above. A graph takes memory and start-up time, and padding
    costs less in a larger batch.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_batch_size, 32)]
    return [*(size for size in sizes if size < max_batch_size), max_batch_size]


class StaticStep:
    """A decode step of a fixed batch size whose tensors keep their addresses."""

    def __init__(
        self, decoder: Decoder, cache: ContiguousKVCache, batch_size: int, num_splits: int | None = None
    ) -> None:
        self.batch_size = batch_size
        self.num_splits = num_splits
        self._decoder = decoder
        self._cache = cache
        metadata = self._metadata([])
        self._on_device = to_device(metadata.values, cache.device, torch.int32)
        self._step = ContiguousStep(cache, metadata, self._on_device, num_splits=num_splits)
        self._wanted = torch.arange(batch_size, device=cache.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def capture(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """Capture the step as a graph with memory from `pool`; without a graph, `run` launches each kernel."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a first run outside the graph loads kernels and allocates workspaces
            self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._logits = self._compute()
        self._graph = graph

    def run(self, decode: Sequence[TokenRange], tokens: Tensor | None = None) -> Tensor:
        """Return the logits after each range's token: (ranges, vocab_size), valid until the next run.

        Args:
            tokens: (ranges,) on the device; replace the token ids of the ranges.
        """
        values = on_host(self._metadata(decode).values, self._cache.device, torch.int32)
        self._on_device.copy_(values, non_blocking=True)
        if tokens is not None:
            self._step.token_ids[: len(tokens)] = tokens
        if self._graph is None:
            self._logits = self._compute()
        else:
            self._graph.replay()
        assert self._logits is not None
        return self._logits[: len(decode)]

    def _compute(self) -> Tensor:
        return self._decoder(self._step, self._wanted)

    def _metadata(self, decode: Sequence[TokenRange]) -> StepMetadata:
        return StepMetadata(decode, [], null_slot=self._cache.null_slot, pad_decode_to=self.batch_size)


class DecodeGraphs:
    """Static steps of all batch sizes; `run` uses the smallest that is large enough."""

    def __init__(
        self,
        decoder: Decoder,
        cache: ContiguousKVCache,
        max_batch_size: int,
        num_splits: Mapping[int, int | None] | None = None,
    ) -> None:
        """Make a static step for each batch size; `num_splits` maps batch sizes to the choices of `split_kv`."""
        sizes = batch_sizes(max_batch_size)
        self.steps = [StaticStep(decoder, cache, size, (num_splits or {}).get(size)) for size in sizes]

    def capture(self) -> None:
        """Capture all sizes on one side stream, the largest first, so that the others reuse its memory in the pool.

        cuBLAS keeps a workspace for every stream that it was used on (8 MB on Ampere, 32 MB on Hopper) and never frees
        it. The side stream has the priority of the batch stream, because the kernels of a graph keep the priority of
        the stream on which they were captured.
        """
        current, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(priority=HIGH_PRIORITY)
        try:
            for step in reversed(self.steps):
                step.capture(pool, stream)
        except RuntimeError:
            # PyTorch does not tell its allocator about a failed capture, and the allocator would free no more memory.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
        finally:
            torch.cuda.set_stream(current)  # a failed capture leaves its own stream current

    def run(self, decode: Sequence[TokenRange], tokens: Tensor | None = None) -> Tensor:
        """See `StaticStep.run`."""
        return next(step for step in self.steps if step.batch_size >= len(decode)).run(decode, tokens)
