"""How many rows fit beside the weights: the memory for keys and values, divided once, at start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import MistralConfig

from .cache import kv_bytes_per_token
from .errors import StartupError
from .progress import in_units

USABLE = {"cuda": 0.9, "cpu": 0.5}
"""Share of the free memory that keys and values may take: a GPU is ours alone, a CPU's memory seldom is."""
OWN_LANE = 0.25
"""Share of that for the own lane's one call, which holds its keys and values twice while beams change places."""
MAX_OWN_LANE_SEQUENCES = 16


@dataclass(frozen=True)
class Capacity:
    """What the engine may hold at once."""

    num_slots: int
    """Rows of the shared lane, each with room for `max_model_len` tokens."""
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
) -> Capacity:
    """Divide the memory that is free once the weights are loaded.

    Raises:
        StartupError: not even one row fits.
    """
    usable_bytes = int(free_bytes * USABLE[device.type])
    token_bytes = kv_bytes_per_token(config, dtype)
    row_bytes = token_bytes * max_model_len
    num_slots = min(max_batch_size, int(usable_bytes * (1 - OWN_LANE)) // row_bytes)
    if num_slots == 0:
        raise StartupError(
            f"One request of {max_model_len} tokens needs {in_units(row_bytes)} of memory beside the weights "
            f"and {in_units(usable_bytes)} can be used: give more memory or choose a smaller --max_model_len."
        )
    own_lane_tokens = min(int(usable_bytes * OWN_LANE) // (2 * token_bytes), MAX_OWN_LANE_SEQUENCES * max_model_len)
    reason = (
        "as asked for" if num_slots == max_batch_size else f"memory allows no more, {max_batch_size} were asked for"
    )
    return Capacity(
        num_slots,
        own_lane_tokens,
        f"batch {num_slots}: {reason}; {in_units(num_slots * row_bytes)} for keys and values "
        f"({max_model_len} tokens each, {in_units(token_bytes)} a token), {own_lane_tokens} tokens for the own lane",
    )
