"""What the hardware allows: memory bandwidth, and the matmuls of one decode step with nothing around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from model_server.compute.cpu.packed_linear import PackedLinear, can_pack
from model_server.compute.fused_linear import Linear
from model_server.compute.kv_cache.base import head_dim


def times_s(work: Callable[[], object], device: str, *, at_least: int = 3, budget_s: float = 0.5) -> list[float]:
    """Return how long each run of `work` took: at least so many runs after a warm-up, more while time is left."""
    work()
    wait_for(device)
    began_s = time.perf_counter()
    taken: list[float] = []
    while len(taken) < at_least or time.perf_counter() - began_s < budget_s:
        start_s = time.perf_counter()
        work()
        wait_for(device)
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
    """All weight matrices of a model, multiplied in their order: what a step of decoding cannot do without."""

    def __init__(self, projections: Sequence[tuple[Callable[[Tensor], Tensor], int]], dtype: torch.dtype, device: str):
        """Take what multiplies, each with the width of its input."""
        self._projections, self._dtype, self._device = projections, dtype, device
        self._inputs: dict[int, Tensor] = {}

    @classmethod
    def made_for(cls, config: MistralConfig, dtype: torch.dtype, device: str, *, fused: bool) -> Matmuls:
        """Make weights of a model's shapes: apart as in the checkpoint, or fused as the server holds them, and packed.

        All layers, not one of them again and again: a layer's weights would stay in the cache.
        """
        shapes = list(shapes_of(config, fused=fused))
        linear = PackedLinear if fused and can_pack(dtype, torch.device(device)) else Linear
        projections = [linear(torch.randn(shape, dtype=dtype, device=device)) for shape in shapes]
        widths = [width for _, width in shapes]
        return cls(list(zip(projections, widths, strict=True)), dtype, device)

    @classmethod
    def of(cls, model: MistralForCausalLM) -> Matmuls:
        """Take a model's own weights as they lie, fused or not: nothing is held twice."""
        config = model.config
        hidden, inner = config.hidden_size, config.intermediate_size
        projections: list[tuple[Any, int]] = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            fused = hasattr(attention, "qkv")
            qkv = [attention.qkv] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
            gate_up = [mlp.gate_up] if fused else [mlp.gate_proj, mlp.up_proj]
            projections += [(projection, hidden) for projection in qkv]
            projections += [(attention.o_proj, config.num_attention_heads * head_dim(config))]
            projections += [(projection, hidden) for projection in gate_up]
            projections += [(mlp.down_proj, inner)]
        return cls([*projections, (model.lm_head, hidden)], model.dtype, model.device.type)

    @torch.inference_mode()
    def run(self, rows: int) -> None:
        for projection, width in self._projections:
            if (found := self._inputs.get(width)) is None or len(found) != rows:
                found = self._inputs[width] = torch.randn((rows, width), dtype=self._dtype, device=self._device)
            projection(found)


def shapes_of(config: MistralConfig, *, fused: bool) -> Iterator[tuple[int, int]]:
    """Yield (outputs, inputs) of every weight matrix that a step multiplies, in order."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, head_dim(config)
    q, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    for _ in range(config.num_hidden_layers):
        yield from [(q + 2 * kv, hidden)] if fused else [(q, hidden), (kv, hidden), (kv, hidden)]
        yield hidden, q
        yield from [(2 * inner, hidden)] if fused else [(inner, hidden)] * 2
        yield hidden, inner
    yield config.vocab_size, hidden


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
