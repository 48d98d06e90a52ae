"""What the hardware allows: memory bandwidth, and the matmuls of one decode step with nothing around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import MistralConfig

from model_server.fusion import Projection, packable
from model_server.memory import head_dim


def times_s(work: Callable[[], object], device: str, *, at_least: int = 3, budget_s: float = 0.5) -> list[float]:
    """Return how long each run of `work` took: at least so many runs after a warm-up, more while time is left."""
    work()
    _wait_for(device)
    began_s = time.perf_counter()
    taken: list[float] = []
    while len(taken) < at_least or time.perf_counter() - began_s < budget_s:
        start_s = time.perf_counter()
        work()
        _wait_for(device)
        taken.append(time.perf_counter() - start_s)
    return taken


def bandwidth(device: str) -> dict[str, float]:
    """Return bytes per second of reading memory, and of copying it (read and written bytes both counted)."""
    num_bytes = (4 if device == "cuda" else 1) << 29  # far beyond any cache
    source = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    return {
        "read": num_bytes / min(times_s(source.sum, device)),
        "copy": 2 * num_bytes / min(times_s(lambda: copy.copy_(source), device)),
    }


class Matmuls:
    """All weight matrices of a model, multiplied in their order: what a step of decoding cannot do without.

    Fused, they are laid out as the server holds them, packed where it packs.
    """

    def __init__(self, config: MistralConfig, dtype: torch.dtype, device: str, *, fused: bool) -> None:
        shapes = list(_shapes(config, fused=fused))
        # All layers, not one of them again and again: a layer's weights would stay in the cache.
        self._weights = [Projection(torch.randn(shape, dtype=dtype, device=device)) for shape in shapes]
        self._inputs: dict[int, Tensor] = {}
        self.num_bytes = sum(projection.weight.nbytes for projection in self._weights)
        self._dtype, self._device, self._widths = dtype, device, [width for _, width in shapes]
        if fused and packable(dtype, torch.device(device)):
            for projection in self._weights:
                projection.pack()

    @torch.inference_mode()
    def run(self, rows: int) -> None:
        for projection, width in zip(self._weights, self._widths, strict=True):
            if (found := self._inputs.get(width)) is None or len(found) != rows:
                found = self._inputs[width] = torch.randn((rows, width), dtype=self._dtype, device=self._device)
            projection(found)


def _shapes(config: MistralConfig, *, fused: bool) -> Iterator[tuple[int, int]]:
    hidden, inner, size = config.hidden_size, config.intermediate_size, head_dim(config)
    q, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    for _ in range(config.num_hidden_layers):
        yield from [(q + 2 * kv, hidden)] if fused else [(q, hidden), (kv, hidden), (kv, hidden)]
        yield hidden, q
        yield from [(2 * inner, hidden)] if fused else [(inner, hidden)] * 2
        yield hidden, inner
    yield config.vocab_size, hidden


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
