"""Split-KV: the fastest number of splits is chosen by measuring, and only if its output is right."""

from __future__ import annotations

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
from model_server.compute.kv_cache.split_kv import choose_num_splits
from tests.support.flash_attention import documented_varlen_attn
from tests.support.tiny_model import tiny_mistral


class Kernel:
    """The documented kernel; remembers its last number of splits, and can be wrong for one."""

    def __init__(self, wrong: int | None = None) -> None:
        self.num_splits: list[int | None] = []
        self.wrong = wrong

    def __call__(self, *args: Any, num_splits: int | None = None, **options: Any) -> Tensor:
        self.num_splits.append(num_splits)
        out = documented_varlen_attn(*args, num_splits=num_splits, **options)
        return out + 1 if num_splits is not None and num_splits == self.wrong else out


def timed(kernel: Kernel, times_ms: dict[int | None, float]) -> Callable[[Callable[[], object]], float]:
    """Return a clock that gives each number of splits its time."""

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
    """The CUDA graphs are captured all the same."""

    def refusing(*args: Any, num_splits: int | None = None, **options: Any) -> Tensor:
        if num_splits is not None:
            raise RuntimeError("num_splits is not supported with this backend.")
        return documented_varlen_attn(*args, **options)

    monkeypatch.setattr(contiguous, "varlen_attn", refusing)

    assert choose_num_splits(make_cache(), [2], 4, measure_ms=lambda call: 1.0) == {2: None}


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
