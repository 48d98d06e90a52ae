"""The model with its KV memory: the only place where the shared lane computes.

Leaves out which rows run (scheduler) and what the logits become (sampling).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from model_server.compute.cuda_graphs import DecodeGraphs
from model_server.compute.decoder import Decoder
from model_server.compute.fused_linear import PADDED_SIZES, Projection, padded
from model_server.compute.host_device import to_device
from model_server.compute.kv_cache.base import KVCache, TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.kv_cache.dense import DenseKVCache

log = logging.getLogger(__name__)


def make_kv_cache(
    config: MistralConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_rows: int,
    num_tokens: int,
    max_sequence_tokens: int,
    flash: bool,
) -> KVCache:
    """Return memory in the form that the device computes best: spans for flash attention, slots for plain."""
    if flash:
        return ContiguousKVCache(
            config,
            num_tokens=num_tokens,
            max_sequence_tokens=max_sequence_tokens,
            dtype=dtype,
            device=device,
            flash=True,
        )
    return DenseKVCache(config, num_slots=num_rows, slot_len=max_sequence_tokens, dtype=dtype, device=device)


class Runner:
    """A fused model and the memory of its rows."""

    def __init__(self, model: MistralForCausalLM, kv_cache: KVCache) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.is_async = model.device.type != "cpu"
        """`forward` returns before it is computed, and whoever looks into the logits waits."""
        self._decoder = Decoder(model)
        self._graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def record_graphs(self, max_rows: int) -> None:
        """Record the decode steps of up to so many rows, where that is possible: on a GPU, over spans."""
        if not isinstance(self.kv_cache, ContiguousKVCache) or not self.kv_cache.flash:
            return
        graphs = DecodeGraphs(self._decoder, self.kv_cache, max_rows)
        try:
            graphs.record()
        except RuntimeError as error:
            log.warning("decode steps run without CUDA graphs, more slowly: %s", str(error).strip().splitlines()[0])
            return
        self._graphs = graphs

    @torch.inference_mode()
    def forward(
        self,
        decode: Sequence[TokenRange],
        prefill: Sequence[TokenRange],
        wanted: Sequence[int],
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Run one step and return the logits after each wanted token, (len(wanted), vocab_size) in float32.

        `wanted` counts tokens through the decode segments, then the prefill segments. `tokens`, (len(decode),) on the
        device, stand in place of those that the decode segments have: picked by a step that nobody has read yet.
        Running a step again gives the same: keys and values are written to their positions, nothing is appended.
        """
        if self._graphs is not None and not prefill:
            # All of them are wanted, in order. A copy: the graph's own tensor is written over by the next step.
            return self._graphs.run(decode, tokens).to(torch.float32, copy=True)
        padding = [0] * (padded(len(wanted)) - len(wanted))
        which = to_device([*wanted, *padding], self.model.device, torch.long)
        step = self.kv_cache.step(decode, prefill)
        if tokens is not None:
            step.token_ids[: len(tokens)] = tokens
        return self._decoder(step, which)[: len(wanted)].float()

    def compilations(self) -> list[Callable[[], None]]:
        """Return what has a CPU's matmuls compiled for every size of step, in calls of one matmul each.

        What is compiled is for the number of threads that the caller computes with.
        """
        if not isinstance(self.model.lm_head, Projection):  # not packed: nothing is kept
            return []
        layer = self.model.model.layers[0]  # the others have the same shapes
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.qkv, attention.o_proj, mlp.gate_up, mlp.down_proj, self.model.lm_head)
        return [functools.partial(projection.compile, size) for size in PADDED_SIZES for projection in projections]
