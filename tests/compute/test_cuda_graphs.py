"""CUDA graphs, with stand-ins for streams and graphs: the captured steps, their stream, replays and operations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model_server.compute.fused_linear import fuse
from model_server.compute.gpu.cuda_graphs import DecodeGraphs, StaticStep, batch_sizes
from model_server.compute.gpu.streams import HIGH_PRIORITY
from model_server.compute.kv_cache import contiguous
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.runner import Runner
from tests.support import cuda
from tests.support.cuda import FakeCuda
from tests.support.flash_attention import documented_varlen_attn
from tests.support.tiny_model import tiny_mistral


def make_runner(*, flash: bool = True) -> Runner:
    model = tiny_mistral()
    fuse(model)
    cache = ContiguousKVCache(
        model.config, num_tokens=900, max_sequence_tokens=100, dtype=model.dtype, device=model.device, flash=flash
    )
    return Runner(model, cache)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(contiguous, "varlen_attn", documented_varlen_attn)
    FakeCuda(monkeypatch)
    return make_runner()


@pytest.mark.parametrize(
    ("max_batch_size", "sizes"),
    [
        (1, [1]),
        (4, [1, 2, 4]),
        (12, [1, 2, 4, 8, 12]),
        (32, [1, 2, 4, 8, 16, 24, 32]),
        (100, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]),
    ],
)
def test_graph_sizes_end_with_the_maximum_batch_size(max_batch_size: int, sizes: list[int]) -> None:
    assert batch_sizes(max_batch_size) == sizes


def test_the_largest_batch_size_needs_few_graphs() -> None:
    assert len(batch_sizes(1024)) < 48


def test_all_graphs_are_captured_on_one_side_stream(runner: Runner) -> None:
    runner.capture_graphs(12)

    assert runner.graphs is not None
    assert all(step.is_captured for step in runner.graphs.steps)
    assert cuda.Stream.made == 1


def test_graphs_have_the_priority_of_the_batchs_stream(runner: Runner) -> None:
    """Without it, the GPU would schedule a graph's kernels like those of the fallback."""
    runner.capture_graphs(2)

    assert runner.graphs is not None
    assert [step._graph.priority for step in runner.graphs.steps] == [HIGH_PRIORITY] * 2


def test_replays_of_different_sizes_equal_plain_attention(runner: Runner) -> None:
    plain = make_runner(flash=False)
    runner.capture_graphs(8)

    for step, batch_size in enumerate((8, 3, 1, 5, 8)):
        decode = [TokenRange(100 * i, step, [20 + i + step]) for i in range(batch_size)]
        logits, expected = (r.forward(decode, [], range(batch_size)) for r in (runner, plain))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_tokens_on_the_device_replace_those_of_the_host(runner: Runner) -> None:
    runner.capture_graphs(4)
    decode = [TokenRange(100 * i, 0, [20 + i]) for i in range(3)]
    unknown = [TokenRange(100 * i, 0, [0]) for i in range(3)]

    expected = runner.forward(decode, [], range(3))

    assert torch.equal(runner.forward(unknown, [], range(3), torch.tensor([20, 21, 22])), expected)


def failing(error: Exception) -> Any:
    def capture(*args: object) -> None:
        raise error

    return capture


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_failed_capture_is_a_warning_and_steps_run_without_graphs(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[RuntimeError]
) -> None:
    """PyTorch raises an AcceleratorError for every CUDA error, even if the device still works."""
    monkeypatch.setattr(DecodeGraphs, "capture", failing(kind("operation not permitted\nmore")))

    runner.capture_graphs(4)

    assert runner.graphs is None
    assert "without CUDA graphs, more slowly: operation not permitted" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"
    assert runner.missing_features == ["cuda_graphs"]


def test_allocator_is_told_that_a_failed_capture_has_ended(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """`CUDAGraph.capture_end` raises before it tells the allocator, and the allocator then fails to free memory."""
    ended: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: ended.append(args))
    monkeypatch.setattr(StaticStep, "capture", failing(torch.AcceleratorError("operation not permitted")))

    runner.capture_graphs(4)

    assert runner.graphs is None
    assert ended == [(0, (0, 1))]


def test_broken_device_stops_the_start(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise torch.AcceleratorError("illegal memory access")

    monkeypatch.setattr(DecodeGraphs, "capture", failing(torch.AcceleratorError("illegal memory access")))
    monkeypatch.setattr(torch.cuda, "synchronize", broken)

    with pytest.raises(torch.AcceleratorError):
        runner.capture_graphs(4)


class Kernels(TorchDispatchMode):
    """Counts the operations that launch a kernel: all except views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and func.overloadpacket.__name__ not in ("empty", "empty_like", "new_empty", "detach"):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations_of_a_decode_step(num_layers: int) -> Counter[str]:
    model = tiny_mistral(head_dim=128, num_hidden_layers=num_layers).to("meta", torch.float16)
    fuse(model)
    cache = ContiguousKVCache(
        model.config, num_tokens=2000, max_sequence_tokens=256, dtype=model.dtype, device=model.device, flash=True
    )
    graphs = DecodeGraphs(Runner(model, cache).decoder, cache, 2)
    with Kernels() as kernels:
        graphs.run([TokenRange(0, 70, [3]), TokenRange(256, 6, [4])])
    return Counter(kernels.names)


def test_layer_of_a_decode_step_is_13_operations() -> None:
    """On a GPU, each operation is a kernel of 2 to 5 us; attention is several kernels."""
    per_layer = operations_of_a_decode_step(3) - operations_of_a_decode_step(2)

    assert per_layer.total() == 13
    assert per_layer == {
        "rms_norm": 2,
        "linear": 2,
        "addmm_": 2,
        "flip": 1,
        "mul_": 2,
        "addcmul_": 1,
        "index_put_": 1,
        "_flash_attention_forward": 1,
        "silu": 1,
    }


def test_decode_step_of_a_7b_models_32_layers_is_430_operations() -> None:
    assert operations_of_a_decode_step(32).total() == 430
