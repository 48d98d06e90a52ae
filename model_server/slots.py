"""KV memory as slots: rows at equal distances, so that one attention call serves them all. For a CPU.

Owns the tensors, which slot is free, and attention over slots. A slot has addresses for the longest row and is reserved
whole; on a CPU the kernel gives memory only to what is written.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MistralConfig

from . import heap
from .attention import chunk_attention
from .fusion import padded
from .memory import Segment, head_dim, kv_bytes_per_token, window_of

LONG_ROW_TOKENS = 128
"""What a separate attention call costs, counted in tokens of a batched one (see `_split_at`)."""
NUM_IN_TURN = 4
"""Slots that requests take in turn which come one at a time."""


class Slots:
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
        self.device = device
        self.max_row_tokens = slot_len
        self.num_tokens = num_slots * slot_len
        self.window = window_of(config, slot_len)
        shape = (config.num_hidden_layers, 2, num_slots, config.num_key_value_heads, slot_len, head_dim(config))
        self._pages: mmap.mmap | None = None
        if device.type == "cpu":
            # An anonymous mapping costs memory only where rows have written, and reads as zeros elsewhere.
            num_bytes = self.num_tokens * kv_bytes_per_token(config, dtype)
            self._pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory = torch.frombuffer(self._pages, dtype=dtype).view(shape)
        else:
            # Zeros and not garbage: what the mask hides is still multiplied, and 0 x NaN is NaN.
            memory = torch.zeros(shape, dtype=dtype, device=device)
        self._memory = memory
        self.keys: list[Tensor] = [memory[layer, 0] for layer in range(config.num_hidden_layers)]
        self.values: list[Tensor] = [memory[layer, 1] for layer in range(config.num_hidden_layers)]
        self._free = set(range(num_slots))
        self._num_slots = num_slots
        self._left = [0] * num_slots
        """For each slot a number that is higher the later it was given back."""
        self._num_left = 0

    def take(self, num_tokens: int) -> int | None:
        """Return the place of the lowest free slot, as low slots keep the batch dense.

        When nothing runs, of the lowest few the one that was left longest ago: conversations that take turns find what
        they left.
        """
        if not self._free:
            return None
        slot = min(self._free)
        if len(self._free) == self._num_slots:
            slot = min(range(min(NUM_IN_TURN, self._num_slots)), key=self._left.__getitem__)
        self._free.remove(slot)
        return slot * self.max_row_tokens

    def give_back(self, place: int) -> None:
        slot = self.slot(place)
        self._num_left += 1
        self._left[slot] = self._num_left
        self._free.add(slot)

    def slot(self, place: int) -> int:
        return place // self.max_row_tokens

    def copy(self, source: int, place: int, num_tokens: int) -> None:
        self._memory[:, :, self.slot(place), :, :num_tokens] = self._memory[:, :, self.slot(source), :, :num_tokens]

    def num_fitting(self, rows: Iterable[int]) -> int:
        return min(len(list(rows)), len(self._free))

    def trim(self) -> bool:
        if self._pages is None:
            return False
        self._pages.madvise(mmap.MADV_DONTNEED)
        heap.trim()
        return True

    def step(self, decode: Sequence[Segment], prefill: Sequence[Segment]) -> SlotStep:
        return SlotStep(self, decode, prefill)


class SlotStep:
    """A step over slots (`decoder.Step`)."""

    def __init__(self, slots: Slots, decode: Sequence[Segment], prefill: Sequence[Segment]) -> None:
        self._slots = slots
        self._prefill = prefill
        self._num_decode = len(decode)
        segments = [*decode, *prefill]
        token_ids = [t for s in segments for t in s.token_ids]
        positions = [p for s in segments for p in range(s.start, s.start + len(s.token_ids))]
        padding = [0] * (padded(len(token_ids)) - len(token_ids))
        self.token_ids = torch.tensor(token_ids + padding, device=slots.device)
        self.positions = torch.tensor(positions + padding, device=slots.device)
        if decode:
            self._plan_decode(decode)

    def _plan_decode(self, decode: Sequence[Segment]) -> None:
        device, window = self._slots.device, self._slots.window
        lengths = [s.start + 1 for s in decode]
        places = [self._slots.slot(s.place) for s in decode]
        self._places = torch.tensor(places, device=device)
        self._last = self.positions[: len(decode)]
        self._num_slots = max(places) + 1
        self._dense = places == list(range(self._num_slots))
        split = _split_at(lengths, self._num_slots)
        self._short_len = split
        self._long = [(i, places[i], length) for i, length in enumerate(lengths) if length > split]
        window = window if window is not None and max(lengths) > window else None
        self._mask: Tensor | None = None
        if split and not (self._dense and min(lengths) >= split and window is None):
            # A slot without a row shows its first key, so that its softmax stays finite; its output is not read.
            row_lengths = torch.ones((self._num_slots, 1), dtype=torch.long, device=device)
            row_lengths[self._places, 0] = self._last + 1
            key_positions = torch.arange(split, device=device)
            seen = key_positions < row_lengths
            if window is not None:
                seen &= key_positions >= row_lengths - window
            # In the keys' own format: a mask of truth values would be turned into this again in every layer.
            self._mask = torch.zeros(seen.shape, dtype=self._slots.keys[0].dtype, device=device)
            self._mask = self._mask.masked_fill_(~seen, -torch.inf)[:, None, None, :]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """See `decoder.Step.attend`."""
        keys, values = self._slots.keys[layer], self._slots.values[layer]
        num_tokens, num_heads, size = q.shape
        kv_heads = k.shape[1]
        n = self._num_decode
        decoded = None
        if n:
            keys[self._places, :, self._last] = k[:n]
            values[self._places, :, self._last] = v[:n]
            rows = q[:n].reshape(n, kv_heads, num_heads // kv_heads, size)
            decoded = self._attend_rows(rows, keys, values, scaling).view(n, -1)
            if n == num_tokens:
                return decoded
        out = q.new_empty((num_tokens, num_heads * size))
        if decoded is not None:
            out[:n] = decoded
        at = n
        for segment in self._prefill:
            length = len(segment.token_ids)
            piece = slice(at, at + length)
            end = segment.start + length
            slot = self._slots.slot(segment.place)
            keys[slot, :, segment.start : end] = k[piece].transpose(0, 1)
            values[slot, :, segment.start : end] = v[piece].transpose(0, 1)
            found = chunk_attention(
                q[piece],
                keys[slot, :, :end],
                values[slot, :, :end],
                segment.start,
                scaling,
                self._slots.window,
            )
            out[piece] = found.reshape(length, -1)
            at += length
        out[at:] = 0  # padding: nobody reads it, but it must stay finite
        return out

    def _attend_rows(self, rows: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Decode attention: rows (n, kv_heads, group, head_dim), one query token each; the group shares its keys."""
        out = None
        if self._short_len:
            queries = rows
            if not self._dense:
                queries = rows.new_zeros((self._num_slots, *rows.shape[1:]))
                queries[self._places] = rows
            out = F.scaled_dot_product_attention(
                queries,
                keys[: self._num_slots, :, : self._short_len],
                values[: self._num_slots, :, : self._short_len],
                attn_mask=self._mask,
                scale=scaling,
            )
            out = out.contiguous() if self._dense else out[self._places]
        if out is None:
            out = torch.empty_like(rows)
        for i, slot, length in self._long:
            first = 0 if self._slots.window is None else max(0, length - self._slots.window)
            out[i] = F.scaled_dot_product_attention(
                rows[i : i + 1],
                keys[slot : slot + 1, :, first:length],
                values[slot : slot + 1, :, first:length],
                scale=scaling,
            )[0]
        return out


def _split_at(lengths: Sequence[int], num_slots: int) -> int:
    """Return how many tokens of every slot the batched attention call should read.

    Rows that are longer get a call of their own: one long row must not make all the others pay for its length. The
    cheapest split is one of the lengths, or 0 (a call for each row).
    """
    best, best_cost = 0, sum(lengths) + LONG_ROW_TOKENS * len(lengths)
    rest, count = best_cost, len(lengths)
    for length in sorted(lengths):
        count -= 1
        rest -= length + LONG_ROW_TOKENS
        cost = num_slots * length + rest
        if cost <= best_cost:
            best, best_cost = length, cost
    return best
