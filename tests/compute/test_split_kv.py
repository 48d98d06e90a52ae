"""Split-KV: measuring selects the fastest number of splits whose output is right."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model_server.compute.decoder import Decoder
from model_server.compute.fused_linear import fuse
from model_server.compute.gpu.cuda_graphs import DecodeGraphs
from model_server.compute.kv_cache import contiguous
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.kv_cache.split_kv import choose_num_splits, measure_on_gpu
from tests.support.cuda import Event, FakeCuda
from tests.support.flash_attention import documented_varlen_attn
from tests.support.tiny_model import tiny_mistral


class Kernel:
    """The documented kernel. It records numbers of splits and offsets, and can be wrong for one number of splits."""

    def __init__(self, wrong: int | None = None) -> None:
        self.num_splits: list[int | None] = []
        self.offsets: list[int] = []
        self.wrong = wrong

    def __call__(self, *args: Any, num_splits: int | None = None, **options: Any) -> Tensor:
        self.num_splits.append(num_splits)
        self.offsets = args[4][:-1].tolist()
        out = documented_varlen_attn(*args, num_splits=num_splits, **options)
        return out + 1 if num_splits is not None and num_splits == self.wrong else out


def timed(kernel: Kernel, times_ms: dict[int | None, float]) -> Callable[[Callable[[], object]], float]:
    """Return a `measure_ms` that returns the given time for each number of splits."""

    def measure_ms(call: Callable[[], object]) -> float:
        call()
        return times_ms[kernel.num_splits[-1]]

    return measure_ms


def make_cache(window: int | None = None) -> ContiguousKVCache:
    config = tiny_mistral(sliding_window=window).config
    return ContiguousKVCache(
        config, num_tokens=200, max_sequence_tokens=90, dtype=torch.float32, device=torch.device("cpu"), flash=True
    )


@pytest.mark.parametrize(
    ("times_ms", "chosen"),
    [
        ({None: 1.0, 2: 0.9, 4: 0.8, 8: 1.2}, 4),
        ({None: 1.0, 2: 0.99, 4: 0.98, 8: 0.98}, None),
        ({None: 0.5, 2: 0.9, 4: 0.8, 8: 1.2}, None),
    ],
    ids=["faster", "within the noise", "slower"],
)
def test_splits_are_used_only_where_they_are_faster(
    monkeypatch: pytest.MonkeyPatch, times_ms: dict[int | None, float], chosen: int | None
) -> None:
    kernel = Kernel()
    monkeypatch.setattr(contiguous, "varlen_attn", kernel)

    assert choose_num_splits(make_cache(), [2], 4, measure_ms=timed(kernel, times_ms)) == {2: chosen}


def test_split_whose_output_is_wrong_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(wrong=4)
    monkeypatch.setattr(contiguous, "varlen_attn", kernel)
    times_ms = {None: 1.0, 2: 0.9, 4: 0.1, 8: 1.2}

    assert choose_num_splits(make_cache(), [2], 4, measure_ms=timed(kernel, times_ms)) == {2: 2}


def test_kernel_that_cannot_split_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs are still captured."""

    def refusing(*args: Any, num_splits: int | None = None, **options: Any) -> Tensor:
        if num_splits is not None:
            raise RuntimeError("num_splits is not supported with this backend.")
        return documented_varlen_attn(*args, **options)

    monkeypatch.setattr(contiguous, "varlen_attn", refusing)

    assert choose_num_splits(make_cache(), [2], 4, measure_ms=lambda call: 1.0) == {2: None}


def test_order_in_which_a_gpu_writes_tokens_changes_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, `index_put_` keeps either value of a repeated index; here, the first call keeps a different one."""
    kernel = Kernel()
    monkeypatch.setattr(contiguous, "varlen_attn", kernel)
    in_order, write = itertools.chain([True], itertools.repeat(False)), torch.Tensor.index_put_

    def unordered(memory: Tensor, indices: tuple[Tensor], values: Tensor) -> Tensor:
        if next(in_order):
            return write(memory, indices, values)
        return write(memory, (indices[0].flip(0),), values.flip(0))

    monkeypatch.setattr(torch.Tensor, "index_put_", unordered)
    times_ms = {None: 1.0, 2: 0.9, 4: 0.1, 8: 1.2}

    assert choose_num_splits(make_cache(), [4], 4, measure_ms=timed(kernel, times_ms)) == {4: 4}


def test_sequences_that_are_measured_read_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(contiguous, "varlen_attn", kernel)

    choose_num_splits(make_cache(), [4], 4, measure_ms=timed(kernel, dict.fromkeys((None, 2, 4, 8), 1.0)))

    assert len(set(kernel.offsets)) == 4


def test_timed_calls_are_launched_while_the_device_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(Event, "record", lambda event: order.append("record"))
    monkeypatch.setattr(Event, "synchronize", lambda event: order.append("wait"))

    measure_on_gpu(lambda: order.append("call"))

    timed_part = order[order.index("sleep") :]
    assert timed_part == ["sleep", "record", *["call"] * 20, "record", "wait"]


def test_sliding_window_is_never_split(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(contiguous, "varlen_attn", kernel)

    assert choose_num_splits(make_cache(window=40), [1, 2], 4) == {1: None, 2: None}
    assert kernel.num_splits == []


def test_measuring_leaves_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(contiguous, "varlen_attn", kernel)
    cache = make_cache()

    choose_num_splits(cache, [2], 4, measure_ms=timed(kernel, dict.fromkeys((None, 2, 4, 8), 1.0)))

    assert not any(memory.any() for memory in cache.by_token)
    assert cache.allocate(200) == 0


def test_each_graph_size_uses_its_own_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(contiguous, "varlen_attn", kernel)
    model = tiny_mistral()
    fuse(model)
    graphs = DecodeGraphs(Decoder(model), make_cache(), 4, {1: None, 2: 8, 4: 2})

    for batch_size, num_splits in ((1, None), (2, 8), (3, 2)):
        kernel.num_splits.clear()
        graphs.run([TokenRange(10 * i, 3, [5]) for i in range(batch_size)])
        assert set(kernel.num_splits) == {num_splits}
