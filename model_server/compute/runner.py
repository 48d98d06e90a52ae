"""The model with its KV cache: computes all batched steps.

It leaves out the choice of the sequences (`scheduler`) and the sampling of tokens (`sampling`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from model_server.compute.cpu.packed_linear import PADDED_SIZES, PackedLinear, padded
from model_server.compute.decoder import Decoder
from model_server.compute.gpu.cuda_graphs import DecodeGraphs, batch_sizes
from model_server.compute.gpu.host_device import to_device
from model_server.compute.kv_cache.base import KVCache, TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.kv_cache.dense import DenseKVCache
from model_server.compute.kv_cache.split_kv import choose_num_splits

log = logging.getLogger(__name__)


def make_kv_cache(
    config: MistralConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    max_batch_size: int,
    num_tokens: int,
    max_sequence_tokens: int,
    flash: bool,
) -> KVCache:
    """Return a contiguous KV cache for flash attention, or a dense one without it."""
    if flash:
        return ContiguousKVCache(
            config,
            num_tokens=num_tokens,
            max_sequence_tokens=max_sequence_tokens,
            dtype=dtype,
            device=device,
            flash=True,
        )
    return DenseKVCache(
        config, max_batch_size=max_batch_size, max_sequence_tokens=max_sequence_tokens, dtype=dtype, device=device
    )


class Runner:
    """A fused model and the KV cache of its sequences."""

    def __init__(self, model: MistralForCausalLM, kv_cache: KVCache) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.is_async = model.device.type != "cpu"
        """Whether `forward` returns before the device has finished; reading the logits then waits for the device."""
        self.decoder = Decoder(model)
        self.graphs: DecodeGraphs | None = None
        self.missing_features: list[str] = []
        """Optimizations that this device should support but does not: flash_attention, cuda_graphs."""

    @torch.inference_mode()
    def capture_graphs(self, max_batch_size: int) -> None:
        """Capture decode steps of up to `max_batch_size` sequences as CUDA graphs; do nothing without flash attention.

        If capturing fails, steps run without graphs.

        Raises:
            torch.AcceleratorError: the device is broken; nothing more can run on it.
        """
        if not isinstance(self.kv_cache, ContiguousKVCache) or not self.kv_cache.flash:
            return
        try:
            num_splits = choose_num_splits(
                self.kv_cache, batch_sizes(max_batch_size), self.model.config.num_attention_heads
            )
            graphs = DecodeGraphs(self.decoder, self.kv_cache, max_batch_size, num_splits)
            graphs.capture()
        except RuntimeError as error:
            if isinstance(error, torch.AcceleratorError):  # operations that a capture forbids raise it too
                torch.cuda.synchronize()  # raises the error again if the device is broken
            log.warning("decode steps run without CUDA graphs, more slowly: %s", str(error).strip().splitlines()[0])
            self.missing_features.append("cuda_graphs")
            return
        self.graphs = graphs

    @torch.inference_mode()
    def forward(
        self,
        decode: Sequence[TokenRange],
        prefill: Sequence[TokenRange],
        wanted: Sequence[int],
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Run one step and return the logits after each wanted token: (len(wanted), vocab_size), in float32.

        A step can be repeated: it writes keys and values to fixed positions and appends nothing.

        Args:
            wanted: indices into the tokens of the decode ranges, followed by those of the prefill ranges.
            tokens: (len(decode),) on the device; replace the token ids of the decode ranges. They come from a step
                whose tokens the host has not read.
        """
        if self.graphs is not None and not prefill:
            # All tokens are wanted, in order. The logits are copied: the next step overwrites the graph's output.
            return self.graphs.run(decode, tokens).to(torch.float32, copy=True)
        padding = [0] * (padded(len(wanted)) - len(wanted))
        which = to_device([*wanted, *padding], self.model.device, torch.long)
        step = self.kv_cache.step(decode, prefill)
        if tokens is not None:
            step.token_ids[: len(tokens)] = tokens
        return self.decoder(step, which)[: len(wanted)].float()

    def compilations(self) -> list[Callable[[], None]]:
        """Return calls that make oneDNN compile the matmuls of every step size, one matmul per call.

        oneDNN compiles for the calling thread's number of OpenMP threads.
        """
        if not isinstance(self.model.lm_head, PackedLinear):
            return []
        layer = self.model.model.layers[0]  # the others have the same shapes
        attention, mlp = layer.self_attn, layer.mlp
        linears = (attention.qkv, attention.o_proj, mlp.gate_up, mlp.down_proj, self.model.lm_head)
        return [functools.partial(linear.compile, size) for size in PADDED_SIZES for linear in linears]
