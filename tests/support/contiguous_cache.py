"""A contiguous KV cache for a small model."""

from __future__ import annotations

from transformers import MistralForCausalLM

from model_server.compute.kv_cache.contiguous import ContiguousKVCache


def contiguous_cache(
    model: MistralForCausalLM, num_tokens: int = 900, max_sequence_tokens: int = 256, *, flash: bool = False
) -> ContiguousKVCache:
    return ContiguousKVCache(
        model.config,
        num_tokens=num_tokens,
        max_sequence_tokens=max_sequence_tokens,
        dtype=model.dtype,
        device=model.device,
        flash=flash,
    )
