"""The KV cache's memory budget: divides the memory that the weights leave free, once at startup."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import MistralConfig

from model_server.compute.kv_cache.base import kv_bytes_per_token
from model_server.errors import StartupError
from model_server.telemetry.progress import in_units

USABLE = {"cuda": 0.9, "cpu": 0.5}
"""The share of the free memory for keys and values. The server does not share a GPU, but often shares host memory."""
FALLBACK_SHARE = 0.25
"""The fallback's share of that memory. A `generate` call holds its keys and values twice while it reorders beams."""
MAX_FALLBACK_SEQUENCES = 16


@dataclass(frozen=True)
class KVCacheBudget:
    """The most that the engine holds at once."""

    max_batch_size: int
    """Sequences in the batch."""
    num_tokens: int
    """Tokens of the batch's sequences together."""
    max_fallback_tokens: int
    """Sequences times length of one `generate` call of the fallback."""
    reason: str
    """One sentence for the log."""


def plan(
    config: MistralConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    free_bytes: int,
    max_model_len: int,
    max_batch_size: int,
    dense: bool,
) -> KVCacheBudget:
    """Divide the memory that is free once the weights are loaded.

    Args:
        free_bytes: the free memory of the device after the weights are loaded.
        dense: each sequence reserves `max_model_len` tokens, not only the tokens that it may need.
    Raises:
        StartupError: not even one sequence of `max_model_len` tokens fits.
    """
    usable_bytes = int(free_bytes * USABLE[device.type])
    token_bytes = kv_bytes_per_token(config, dtype)
    sequence_bytes = token_bytes * max_model_len
    batch_bytes = int(usable_bytes * (1 - FALLBACK_SHARE))
    if batch_bytes < sequence_bytes:
        raise StartupError(
            f"One request of {max_model_len} tokens needs {in_units(sequence_bytes)} of memory beside the weights, "
            f"and {in_units(batch_bytes)} can be used: give the container more memory or choose a smaller "
            "--max_model_len."
        )
    max_fallback_tokens = min(
        int(usable_bytes * FALLBACK_SHARE) // (2 * token_bytes), MAX_FALLBACK_SEQUENCES * max_model_len
    )
    asked_for = max_batch_size
    if dense:
        max_batch_size = min(asked_for, batch_bytes // sequence_bytes)
        num_tokens = max_batch_size * max_model_len
    else:
        num_tokens = min(batch_bytes // token_bytes, asked_for * max_model_len)
    why = "as configured" if max_batch_size == asked_for else f"memory allows no more of the {asked_for} configured"
    return KVCacheBudget(
        max_batch_size,
        num_tokens,
        max_fallback_tokens,
        f"max_batch_size {max_batch_size}: {why}; KV cache {in_units(num_tokens * token_bytes)}, {num_tokens} tokens "
        f"({in_units(token_bytes)} each, a request holds up to {max_model_len}); "
        f"fallback {max_fallback_tokens} tokens",
    )
