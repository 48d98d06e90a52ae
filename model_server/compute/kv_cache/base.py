"""The KV cache's interface, which the contiguous and the dense layout share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import MistralConfig

from model_server.compute.decoder import Step


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Consecutive tokens of one sequence that a step computes.

    The tokens are a chunk of the prompt, or the latest token, with or without drafted tokens after it.
    """

    kv_offset: int
    """The first position of the sequence's keys and values in the cache, in tokens."""
    start: int
    """The position of the first token in its sequence."""
    token_ids: Sequence[int]

    @property
    def kv_len(self) -> int:
        """The number of the sequence's tokens in the cache after the step."""
        return self.start + len(self.token_ids)


class KVCache(Protocol):
    """The keys and values of the running sequences.

    Admission reserves memory for a sequence's prompt and for all tokens that it may generate. A running sequence
    therefore never runs out of memory.
    """

    num_tokens: int
    """Capacity in tokens."""
    max_sequence_tokens: int
    """Capacity of one sequence in tokens."""

    def allocate(self, num_tokens: int) -> int | None:
        """Reserve memory for a sequence and return its offset, or None if there is no room.

        The keys and values of earlier sequences stay in that memory until they are overwritten.
        """

    def free(self, kv_offset: int) -> None: ...

    def copy(self, source: int, kv_offset: int, num_tokens: int) -> None:
        """Copy the first tokens of a sequence to another offset; the two regions must not overlap."""

    def num_allocatable(self, lengths: Iterable[int]) -> int:
        """Return how many sequences of these lengths could be allocated now, in this order."""

    def release_unused(self) -> bool:
        """Return unused memory to the system; return whether the cache supports it. Call it with nothing allocated."""

    def step(self, decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> Step:
        """Return a step over these ranges as tensors. A `decode` range has one token, a `prefill` range any number."""


def kv_bytes_per_token(config: MistralConfig, dtype: torch.dtype) -> int:
    """Return the size in bytes of one token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * dtype.itemsize


def head_dim(config: MistralConfig) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


def window_of(config: MistralConfig, max_sequence_tokens: int) -> int | None:
    """Return the sliding window in tokens, or None if no sequence is longer than it."""
    window = config.sliding_window
    return window if window is not None and window < max_sequence_tokens else None
