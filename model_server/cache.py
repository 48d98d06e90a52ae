"""KV memory of the shared lane: a fixed number of slots, one row each, written in place.

Owns the tensors and which slot is free. A slot holds `slot_len` tokens, reserved whole when a request is admitted, so a
running row never runs out. Knows neither requests nor attention.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor
from transformers import MistralConfig


def kv_bytes_per_token(config: MistralConfig, dtype: torch.dtype) -> int:
    """Return the bytes that one token's keys and values take over all layers."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize


class SlotCache:
    """Keys and values of all layers: for each layer a pair of (num_slots, kv_heads, slot_len, head_dim)."""

    def __init__(
        self,
        config: MistralConfig,
        *,
        num_slots: int,
        slot_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.slot_len = slot_len
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, num_slots, config.num_key_value_heads, slot_len, head_dim)
        self.num_bytes = num_slots * slot_len * kv_bytes_per_token(config, dtype)
        self._pages: mmap.mmap | None = None
        if device.type == "cpu":
            # An anonymous mapping costs memory only where rows have written, and reads as zeros elsewhere.
            self._pages = mmap.mmap(-1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory = torch.frombuffer(self._pages, dtype=dtype).view(shape)
        else:
            # Zeros and not garbage: what the mask hides is still multiplied, and 0 x NaN is NaN.
            memory = torch.zeros(shape, dtype=dtype, device=device)
        self.keys: list[Tensor] = [memory[layer, 0] for layer in range(config.num_hidden_layers)]
        self.values: list[Tensor] = [memory[layer, 1] for layer in range(config.num_hidden_layers)]
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """Return the lowest free slot; low slots keep the batch dense."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)
        self._free.sort(reverse=True)

    def trim(self) -> None:
        """Hand unused memory back to the system; call when no row is held. A GPU's memory stays ours."""
        if self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED)
