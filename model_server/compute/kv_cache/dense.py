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

from model_server.compute.attention import chunk_attention
from model_server.compute.cpu import malloc
from model_server.compute.fused_linear import padded
from model_server.compute.kv_cache.base import TokenRange, head_dim, kv_bytes_per_token, window_of

LONG_ROW_TOKENS = 128
"""What a separate attention call costs, counted in tokens of a batched one (see `_split_at`)."""
NUM_IN_TURN = 4
"""Slots that requests take in turn which come one at a time."""


class DenseKVCache:
    """Keys and values of all layers: (layers, 2, num_slots, kv_heads, slot_len, head_dim)."""

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
        self.max_sequence_tokens = slot_len
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
        self.memory = memory
        self.by_token = memory.permute(0, 2, 4, 1, 3, 5).unbind()
        """The same seen as it is written: for each layer (num_slots, slot_len, 2, kv_heads, head_dim)."""
        self._free = set(range(num_slots))
        self._num_slots = num_slots
        self._left = [0] * num_slots
        """For each slot a number that is higher the later it was given back."""
        self._num_left = 0

    def allocate(self, num_tokens: int) -> int | None:
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
        return slot * self.max_sequence_tokens

    def free(self, place: int) -> None:
        slot = self.slot(place)
        self._num_left += 1
        self._left[slot] = self._num_left
        self._free.add(slot)

    def slot(self, place: int) -> int:
        return place // self.max_sequence_tokens

    def copy(self, source: int, place: int, num_tokens: int) -> None:
        self.memory[:, :, self.slot(place), :, :num_tokens] = self.memory[:, :, self.slot(source), :, :num_tokens]

    def num_allocatable(self, rows: Iterable[int]) -> int:
        return min(len(list(rows)), len(self._free))

    def release_unused(self) -> bool:
        if self._pages is None:
            return False
        self._pages.madvise(mmap.MADV_DONTNEED)
        malloc.trim()
        return True

    def step(self, decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> SlotStep:
        return SlotStep(self, decode, prefill)


class SlotStep:
    """A step over slots (`decoder.Step`).

    What it reads and writes is cut out for all layers at once: cutting takes a CPU as long as a small computation.
    """

    def __init__(self, slots: DenseKVCache, decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        self._slots = slots
        self._num_decode = len(decode)
        segments = [*decode, *prefill]
        token_ids = [t for s in segments for t in s.token_ids]
        positions = [p for s in segments for p in range(s.start, s.start + len(s.token_ids))]
        padding = [0] * (padded(len(token_ids)) - len(token_ids))
        self.token_ids = torch.tensor(token_ids + padding, device=slots.device)
        self.positions = torch.tensor(positions + padding, device=slots.device)
        self._chunks = [TextDelta(slots, segment) for segment in prefill]
        self._lengths = [len(decode), *(len(segment.token_ids) for segment in prefill), len(padding)]
        if decode:
            self._plan_decode(decode)

    def _plan_decode(self, decode: Sequence[TokenRange]) -> None:
        memory, device, window = self._slots.memory, self._slots.device, self._slots.window
        kv_heads = memory.shape[3]
        lengths = [s.start + 1 for s in decode]
        places = [self._slots.slot(s.place) for s in decode]
        self._places = torch.tensor(places, device=device)
        self._last = self.positions[: len(decode)]
        self._num_slots = num_slots = max(places) + 1
        self._dense = places == list(range(num_slots))
        split = _split_at(lengths, num_slots)
        # A key head of a slot is a sequence of its own: the output then lies as it is wanted.
        self._short = _layers(memory[:, :, :num_slots, :, :split].flatten(2, 3).unsqueeze(3)) if split else []
        self._long: list[tuple[int, Sequence[Tensor]]] = []
        for row, (slot, length) in enumerate(zip(places, lengths, strict=True)):
            if length > split:
                first = 0 if window is None else max(0, length - window)
                self._long.append((row, _layers(memory[:, :, slot : slot + 1, :, first:length])))
        window = window if window is not None and max(lengths) > window else None
        self._mask: Tensor | None = None
        if split and not (self._dense and min(lengths) >= split and window is None):
            # A slot without a row shows its first key, so that its softmax stays finite; its output is not read.
            row_lengths = torch.ones((num_slots, 1), dtype=torch.long, device=device)
            row_lengths[self._places, 0] = self._last + 1
            key_positions = torch.arange(split, device=device)
            seen = key_positions < row_lengths
            if window is not None:
                seen &= key_positions >= row_lengths - window
            # In the keys' own format: a mask of truth values would be turned into this again in every layer.
            mask = torch.zeros(seen.shape, dtype=memory.dtype, device=device).masked_fill_(~seen, -torch.inf)
            self._mask = mask.repeat_interleave(kv_heads, 0)[:, None, None, :]

    def attend(self, layer: int, q: Tensor, kv: Tensor, scaling: float) -> Tensor:
        """See `decoder.Step.attend`."""
        n = self._num_decode
        if n == len(q):
            return self._attend_rows(layer, q, kv, scaling)
        decoding, *queries, _ = q.split(self._lengths)
        decoded, *written, _ = kv.split(self._lengths)
        found = [self._attend_rows(layer, decoding, decoded, scaling)] if n else []
        for chunk, asked, new in zip(self._chunks, queries, written, strict=True):
            found.append(chunk.attend(layer, asked, new, scaling))
        found.append(q.new_zeros((self._lengths[-1], found[0].shape[1])))  # padding, which nobody reads
        return torch.cat(found)

    def _attend_rows(self, layer: int, q: Tensor, kv: Tensor, scaling: float) -> Tensor:
        """Decode attention: one query token for each row; the query heads of a group share its keys."""
        self._slots.by_token[layer].index_put_((self._places, self._last), kv)
        num_rows, num_heads, size = q.shape
        kv_heads = kv.shape[2]
        rows = q.reshape(num_rows, kv_heads, num_heads // kv_heads, size)
        out = None
        if self._short:
            queries = rows
            if not self._dense:
                queries = rows.new_zeros((self._num_slots, *rows.shape[1:]))
                queries[self._places] = rows
            out = F.scaled_dot_product_attention(
                queries.reshape(-1, 1, *rows.shape[2:]),
                self._short[2 * layer],
                self._short[2 * layer + 1],
                attn_mask=self._mask,
                scale=scaling,
            )
            out = out.view(-1, *rows.shape[1:])
            if not self._dense:
                out = out[self._places]
        if out is None:
            out = torch.empty_like(rows)
        for row, read in self._long:
            out[row] = F.scaled_dot_product_attention(
                rows[row : row + 1], read[2 * layer], read[2 * layer + 1], scale=scaling
            )[0]
        return out.view(num_rows, -1)


class TextDelta:
    """A piece of a prompt that a step reads."""

    def __init__(self, slots: DenseKVCache, segment: TokenRange) -> None:
        slot, end = slots.slot(segment.place), segment.start + len(segment.token_ids)
        self._start, self._window = segment.start, slots.window
        self._keys_and_values = _layers(slots.memory[:, :, slot, :, :end])
        self._written = slots.memory[:, :, slot, :, segment.start : end].permute(0, 3, 1, 2, 4).unbind()

    def attend(self, layer: int, q: Tensor, kv: Tensor, scaling: float) -> Tensor:
        """Write keys and values and return attention's output; shapes as in `decoder.Step.attend`."""
        self._written[layer].copy_(kv)
        keys, values = self._keys_and_values[2 * layer], self._keys_and_values[2 * layer + 1]
        return chunk_attention(q, keys, values, self._start, scaling, self._window).reshape(len(q), -1)


def _layers(memory: Tensor) -> Sequence[Tensor]:
    """Return the keys of the first layer, its values, the keys of the second, and so on."""
    return memory.flatten(0, 1).unbind()


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
