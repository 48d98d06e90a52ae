"""What the shared lane asks of its KV memory, whatever it looks like inside (slots, spans)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import MistralConfig

from model_server.compute.decoder import Step


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Consecutive tokens of one row: a chunk of its prompt, or the one token it decodes."""

    place: int
    """Where the row's keys and values begin, in tokens of the memory."""
    start: int
    """Position of the first token, counted from the row's beginning."""
    token_ids: Sequence[int]


class KVCache(Protocol):
    """Keys and values of the running rows; a row's memory is reserved whole, so that it never runs out."""

    num_tokens: int
    """All that it holds."""
    max_sequence_tokens: int
    """The most that one row may hold."""

    def allocate(self, num_tokens: int) -> int | None:
        """Reserve memory for a row of so many tokens and return its place, or None while there is none.

        What it holds from an earlier row stays until it is written over.
        """

    def free(self, place: int) -> None: ...

    def copy(self, source: int, place: int, num_tokens: int) -> None:
        """Copy the keys and values of a row's first tokens to another place; the two must not overlap."""

    def num_allocatable(self, rows: Iterable[int]) -> int:
        """Return how many of these rows, given by their tokens, would get a place now, in this order."""

    def release_unused(self) -> bool:
        """Hand unused memory back to the system and say whether that is possible; call when no row is held."""

    def step(self, decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> Step:
        """Return a step of these segments in tensors, `decode` (one token each) first."""


def kv_bytes_per_token(config: MistralConfig, dtype: torch.dtype) -> int:
    """Return the bytes that one token's keys and values take over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * dtype.itemsize


def head_dim(config: MistralConfig) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


def window_of(config: MistralConfig, max_sequence_tokens: int) -> int | None:
    """Return the sliding window in tokens, or None when no row is long enough to notice it."""
    window = config.sliding_window
    return window if window is not None and window < max_sequence_tokens else None
