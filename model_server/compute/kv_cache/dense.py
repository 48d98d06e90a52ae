"""The dense KV cache for CPUs: every sequence has a region of the maximum length, so one attention call serves all.

It owns the tensors, allocates regions and computes attention over them. A region reserves only addresses: the operating
system provides memory for the pages that are written.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MistralConfig

from model_server.compute.attention import chunk_attention, short_chunk_attention, short_chunk_mask
from model_server.compute.cpu import malloc
from model_server.compute.cpu.packed_linear import padded
from model_server.compute.gpu.host_device import to_device
from model_server.compute.kv_cache.base import TokenRange, head_dim, kv_bytes_per_token, window_of

SEPARATE_CALL_TOKENS = 128
"""The cost of a separate attention call, in tokens of a batched call (see `_batched_length`)."""
SHORT_CHUNK_TOKENS = 65
"""The longest chunk whose keys are not copied for attention: the latest token with the longest draft."""
NUM_ROTATED = 4
"""The number of regions that are used in turn while only one request runs at a time."""


class DenseKVCache:
    """The keys and values of all layers: (layers, 2, max_batch_size, kv_heads, max_sequence_tokens, head_dim)."""

    def __init__(
        self,
        config: MistralConfig,
        *,
        max_batch_size: int,
        max_sequence_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.device = device
        self.max_batch_size = max_batch_size
        self.max_sequence_tokens = max_sequence_tokens
        self.num_tokens = max_batch_size * max_sequence_tokens
        self.window = window_of(config, max_sequence_tokens)
        self.group = config.num_attention_heads // config.num_key_value_heads
        kv_heads, size = config.num_key_value_heads, head_dim(config)
        shape = (config.num_hidden_layers, 2, max_batch_size, kv_heads, max_sequence_tokens, size)
        self._pages: mmap.mmap | None = None
        if device.type == "cpu":
            # An anonymous mapping takes memory only for written pages and reads as zeros elsewhere.
            num_bytes = self.num_tokens * kv_bytes_per_token(config, dtype)
            self._pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory = torch.frombuffer(self._pages, dtype=dtype).view(shape)
        else:
            # Initialised with zeros: masked keys are still multiplied, and 0 x NaN is NaN.
            memory = torch.zeros(shape, dtype=dtype, device=device)
        self.memory = memory
        self.by_token = memory.permute(0, 2, 4, 1, 3, 5).unbind()
        """Views for writing: for each layer, (max_batch_size, max_sequence_tokens, 2, kv_heads, head_dim)."""
        self._free = set(range(max_batch_size))
        self._freed_at = [0] * max_batch_size
        """The order in which the regions were freed: a later free has a higher number."""
        self._num_freed = 0

    def allocate(self, num_tokens: int) -> int | None:
        """Reserve the lowest free region and return its offset; low regions keep the batch dense.

        If no request runs, reserve the least recently freed of the first `NUM_ROTATED` regions: alternating
        conversations then find their prefixes in the cache.
        """
        if not self._free:
            return None
        index = min(self._free)
        if len(self._free) == self.max_batch_size:
            index = min(range(min(NUM_ROTATED, self.max_batch_size)), key=self._freed_at.__getitem__)
        self._free.remove(index)
        return index * self.max_sequence_tokens

    def free(self, kv_offset: int) -> None:
        index = self.index(kv_offset)
        self._num_freed += 1
        self._freed_at[index] = self._num_freed
        self._free.add(index)

    def index(self, kv_offset: int) -> int:
        """Return the index of the region that begins at an offset."""
        return kv_offset // self.max_sequence_tokens

    def copy(self, source: int, kv_offset: int, num_tokens: int) -> None:
        memory = self.memory
        memory[:, :, self.index(kv_offset), :, :num_tokens] = memory[:, :, self.index(source), :, :num_tokens]

    def num_allocatable(self, lengths: Iterable[int]) -> int:
        return min(len(list(lengths)), len(self._free))

    def release_unused(self) -> bool:
        if self._pages is None:
            return False
        self._pages.madvise(mmap.MADV_DONTNEED)
        malloc.trim()
        return True

    def step(self, decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> DenseStep:
        return DenseStep(self, decode, prefill)


class DenseStep:
    """A step over a dense KV cache (`decoder.Step`).

    The constructor makes the views of all layers at once, because making a view takes a CPU as long as a small
    computation.
    """

    def __init__(self, cache: DenseKVCache, decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        self._cache = cache
        self._num_decode = len(decode)
        ranges = [*decode, *prefill]
        token_ids = [t for r in ranges for t in r.token_ids]
        positions = [p for r in ranges for p in range(r.start, r.kv_len)]
        padding = [0] * (padded(len(token_ids)) - len(token_ids))
        self.token_ids = to_device(token_ids + padding, cache.device, torch.long)
        self.positions = to_device(positions + padding, cache.device, torch.long)
        self._chunks = [Chunk(cache, chunk) for chunk in prefill]
        self._lengths = [len(decode), *(len(chunk.token_ids) for chunk in prefill), len(padding)]
        if decode:
            self._plan_decode(decode)

    def _plan_decode(self, decode: Sequence[TokenRange]) -> None:
        memory, device, window = self._cache.memory, self._cache.device, self._cache.window
        kv_heads = memory.shape[3]
        kv_lens = [r.kv_len for r in decode]
        indices = [self._cache.index(r.kv_offset) for r in decode]
        self._indices = to_device(indices, device, torch.long)
        self._last = self.positions[: len(decode)]
        self._num_regions = num_regions = max(indices) + 1
        self._in_order = indices == list(range(num_regions))
        batched_len = _batched_length(kv_lens, num_regions)
        # Each key head of a region counts as one sequence: the output then has the layout that the decoder needs.
        short = memory[:, :, :num_regions, :, :batched_len].flatten(2, 3).unsqueeze(3)
        self._short = _layers(short) if batched_len else []
        self._long: list[tuple[int, Sequence[Tensor]]] = []
        for sequence, (index, kv_len) in enumerate(zip(indices, kv_lens, strict=True)):
            if kv_len > batched_len:
                first = 0 if window is None else max(0, kv_len - window)
                self._long.append((sequence, _layers(memory[:, :, index : index + 1, :, first:kv_len])))
        window = window if window is not None and max(kv_lens) > window else None
        self._mask: Tensor | None = None
        if batched_len and not (self._in_order and min(kv_lens) >= batched_len and window is None):
            # A region without a sequence attends to its first key to keep its softmax finite; its output is unused.
            lens = torch.ones((num_regions, 1), dtype=torch.long, device=device)
            lens[self._indices, 0] = self._last + 1
            key_positions = torch.arange(batched_len, device=device)
            visible = key_positions < lens
            if window is not None:
                visible &= key_positions >= lens - window
            # In the dtype of the keys: every layer would have to convert a boolean mask.
            mask = torch.zeros(visible.shape, dtype=memory.dtype, device=device).masked_fill_(~visible, -torch.inf)
            self._mask = mask.repeat_interleave(kv_heads, 0)[:, None, None, :]

    def attend(self, layer: int, q: Tensor, kv: Tensor, scaling: float) -> Tensor:
        """See `decoder.Step.attend`."""
        n = self._num_decode
        if n == len(q):
            return self._attend_decode(layer, q, kv, scaling)
        decode_q, *chunks_q, _ = q.split(self._lengths)
        decode_kv, *chunks_kv, _ = kv.split(self._lengths)
        outputs = [self._attend_decode(layer, decode_q, decode_kv, scaling)] if n else []
        for chunk, chunk_q, chunk_kv in zip(self._chunks, chunks_q, chunks_kv, strict=True):
            outputs.append(chunk.attend(layer, chunk_q, chunk_kv, scaling))
        outputs.append(q.new_zeros((self._lengths[-1], outputs[0].shape[1])))  # padding
        return torch.cat(outputs)

    def _attend_decode(self, layer: int, q: Tensor, kv: Tensor, scaling: float) -> Tensor:
        """Return the attention output of one query token of each sequence: (sequences, heads * head_dim)."""
        self._cache.by_token[layer].index_put_((self._indices, self._last), kv)
        num_sequences, num_heads, size = q.shape
        kv_heads = kv.shape[2]
        grouped = q.reshape(num_sequences, kv_heads, num_heads // kv_heads, size)
        out = None
        if self._short:
            queries = grouped
            if not self._in_order:
                queries = grouped.new_zeros((self._num_regions, *grouped.shape[1:]))
                queries[self._indices] = grouped
            out = F.scaled_dot_product_attention(
                queries.reshape(-1, 1, *grouped.shape[2:]),
                self._short[2 * layer],
                self._short[2 * layer + 1],
                attn_mask=self._mask,
                scale=scaling,
            )
            out = out.view(-1, *grouped.shape[1:])
            if not self._in_order:
                out = out[self._indices]
        if out is None:
            out = torch.empty_like(grouped)
        for sequence, kv_views in self._long:
            out[sequence] = F.scaled_dot_product_attention(
                grouped[sequence : sequence + 1], kv_views[2 * layer], kv_views[2 * layer + 1], scale=scaling
            )[0]
        return out.view(num_sequences, -1)


class Chunk:
    """Consecutive tokens of one sequence: a part of its prompt, or its latest token with a draft."""

    def __init__(self, cache: DenseKVCache, chunk: TokenRange) -> None:
        index = cache.index(chunk.kv_offset)
        self._start, self._window = chunk.start, cache.window
        self._mask: Tensor | None = None
        if chunk.start and len(chunk.token_ids) <= SHORT_CHUNK_TOKENS:
            self._mask = short_chunk_mask(
                len(chunk.token_ids), chunk.start, cache.window, cache.group, cache.memory.dtype, cache.device
            )
        self._keys_and_values = _layers(cache.memory[:, :, index, :, : chunk.kv_len])
        self._written = cache.memory[:, :, index, :, chunk.start : chunk.kv_len].permute(0, 3, 1, 2, 4).unbind()

    def attend(self, layer: int, q: Tensor, kv: Tensor, scaling: float) -> Tensor:
        """Write the keys and values and return the attention output; shapes as in `decoder.Step.attend`."""
        self._written[layer].copy_(kv)
        keys, values = self._keys_and_values[2 * layer], self._keys_and_values[2 * layer + 1]
        if self._mask is not None:
            return short_chunk_attention(q, keys, values, self._mask, scaling).reshape(len(q), -1)
        return chunk_attention(q, keys, values, self._start, scaling, self._window).reshape(len(q), -1)


def _layers(memory: Tensor) -> Sequence[Tensor]:
    """Return the keys of the first layer, its values, the keys of the second layer, and so on."""
    return memory.flatten(0, 1).unbind()


def _batched_length(kv_lens: Sequence[int], num_regions: int) -> int:
    """Return how many tokens of every region the batched attention call should read.

    Longer sequences get a separate call, so that a long sequence does not slow down all others. The cheapest length is
    the length of one of the sequences, or 0 (a separate call for each sequence).
    """
    best, best_cost = 0, sum(kv_lens) + SEPARATE_CALL_TOKENS * len(kv_lens)
    rest, count = best_cost, len(kv_lens)
    for kv_len in sorted(kv_lens):
        count -= 1
        rest -= kv_len + SEPARATE_CALL_TOKENS
        cost = num_regions * kv_len + rest
        if cost <= best_cost:
            best, best_cost = kv_len, cost
    return best
