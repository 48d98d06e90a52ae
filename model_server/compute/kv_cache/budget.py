"""How many rows fit beside the weights: the memory for keys and values, divided once, at start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import MistralConfig

from model_server.compute.kv_cache.base import kv_bytes_per_token
from model_server.errors import StartupError
from model_server.telemetry.progress import in_units

USABLE = {"cuda": 0.9, "cpu": 0.5}
"""Share of the free memory that keys and values may take: a GPU is ours alone, a CPU's memory seldom is."""
OWN_LANE = 0.25
"""Share of that for the own lane's one call, which holds its keys and values twice while beams change places."""
MAX_OWN_LANE_SEQUENCES = 16


@dataclass(frozen=True)
class Capacity:
    """What the engine may hold at once."""

    num_rows: int
    """Rows of the shared lane."""
    num_tokens: int
    """Tokens of all of them together."""
    own_lane_tokens: int
    """Sequences times length of one own-lane call."""
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
    equal_rows: bool,
) -> Capacity:
    """Divide the memory that is free once the weights are loaded.

    Args:
        equal_rows: each row reserves the longest length there is (`slots.py`), not only what it may need (`spans.py`).
    Raises:
        StartupError: not even one row of the longest length fits.
    """
    usable_bytes = int(free_bytes * USABLE[device.type])
    token_bytes = kv_bytes_per_token(config, dtype)
    row_bytes = token_bytes * max_model_len
    shared_bytes = int(usable_bytes * (1 - OWN_LANE))
    if shared_bytes < row_bytes:
        raise StartupError(
            f"One request of {max_model_len} tokens needs {in_units(row_bytes)} of memory beside the weights "
            f"and {in_units(usable_bytes)} can be used: give more memory or choose a smaller --max_model_len."
        )
    own_lane_tokens = min(int(usable_bytes * OWN_LANE) // (2 * token_bytes), MAX_OWN_LANE_SEQUENCES * max_model_len)
    if equal_rows:
        num_rows = min(max_batch_size, shared_bytes // row_bytes)
        num_tokens = num_rows * max_model_len
    else:
        num_rows = max_batch_size
        num_tokens = min(shared_bytes // token_bytes, max_batch_size * max_model_len)
    asked = "as asked for" if num_rows == max_batch_size else f"memory allows no more, {max_batch_size} were asked for"
    return Capacity(
        num_rows,
        num_tokens,
        own_lane_tokens,
        f"batch {num_rows}: {asked}; {in_units(num_tokens * token_bytes)} for keys and values, {num_tokens} tokens "
        f"({in_units(token_bytes)} each, a request holds up to {max_model_len}), "
        f"{own_lane_tokens} tokens for the own lane",
    )
