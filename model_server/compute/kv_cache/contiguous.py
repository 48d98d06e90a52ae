"""The contiguous KV cache for GPUs: each sequence reserves only the tokens that it may need, in one region of a pool.

It owns the pool and computes attention over it. 24 GB hold many requests of average length instead of a few of maximum
length. Contiguous sequences need no block table: PyTorch's flash attention (`torch.nn.attention.varlen`) reads keys at
any offset. It leaves out the allocator (`free_list`) and the check of the kernel (`flash_check`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import MistralConfig

from model_server.compute.attention import chunk_attention
from model_server.compute.gpu.flash_attention import varlen_attn
from model_server.compute.gpu.host_device import to_device
from model_server.compute.kv_cache.base import TokenRange, head_dim, window_of
from model_server.compute.kv_cache.free_list import FreeListAllocator


class ContiguousKVCache:
    """The keys and values of all layers: for each layer, a pair of (num_tokens + 1, kv_heads, head_dim).

    The last token is a null slot, to which padding is written.
    """

    def __init__(
        self,
        config: MistralConfig,
        *,
        num_tokens: int,
        max_sequence_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        flash: bool,
    ) -> None:
        """Allocate the pool; `flash` selects flash attention (see `flash_check`) instead of plain PyTorch."""
        self.num_tokens = num_tokens
        self.max_sequence_tokens = max_sequence_tokens
        self.device = device
        self.flash = flash
        self.window = window_of(config, max_sequence_tokens)
        self.null_slot = num_tokens
        shape = (config.num_hidden_layers, 2, num_tokens + 1, config.num_key_value_heads, head_dim(config))
        # Initialised with zeros: keys beyond a sequence's end are masked, but 0 x NaN is NaN.
        memory = torch.zeros(shape, dtype=dtype, device=device)
        self._memory = memory
        self.keys: list[Tensor] = [memory[layer, 0] for layer in range(config.num_hidden_layers)]
        self.values: list[Tensor] = [memory[layer, 1] for layer in range(config.num_hidden_layers)]
        self.by_token = memory.transpose(1, 2).unbind()
        """Views of the same memory for writing: for each layer, (num_tokens + 1, 2, kv_heads, head_dim)."""
        self._free = FreeListAllocator(num_tokens)
        self._lengths: dict[int, int] = {}
        """Maps the offset of each allocated sequence to its length."""

    def allocate(self, num_tokens: int) -> int | None:
        kv_offset = self._free.allocate(num_tokens)
        if kv_offset is not None:
            self._lengths[kv_offset] = num_tokens
        return kv_offset

    def free(self, kv_offset: int) -> None:
        self._free.free(kv_offset, self._lengths.pop(kv_offset))

    def copy(self, source: int, kv_offset: int, num_tokens: int) -> None:
        self._memory[:, :, kv_offset : kv_offset + num_tokens] = self._memory[:, :, source : source + num_tokens]

    def num_allocatable(self, lengths: Iterable[int]) -> int:
        free, count = self._free.copy(), 0
        for num_tokens in lengths:
            if free.allocate(num_tokens) is None:
                break
            count += 1
        return count

    def release_unused(self) -> bool:
        return False  # the server does not share the GPU

    def step(self, decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> ContiguousStep:
        metadata = StepMetadata(decode, prefill, null_slot=self.null_slot)
        return ContiguousStep(self, metadata, to_device(metadata.values, self.device, torch.int32))


class AttentionGroup:
    """The ranges that one attention call computes: the decode ranges or the prefill ranges of a step."""

    def __init__(self, ranges: Sequence[TokenRange]) -> None:
        self.kv_offsets = [r.kv_offset for r in ranges]
        self.q_lens = [len(r.token_ids) for r in ranges]
        self.kv_lens = [r.kv_len for r in ranges]
        self.max_q = max(self.q_lens, default=0)
        cu_seqlens_q = itertools.accumulate(self.q_lens, initial=0)
        # FlashAttention's cu_seqlens_k has one element more than there are sequences; with seqused_k, it is not read.
        self.values = [*cu_seqlens_q, *self.kv_offsets, 0, *self.kv_lens]
        self.sizes = [len(ranges) + 1, len(ranges) + 1, len(ranges)]


class StepMetadata:
    """All numbers that a step needs on the device, in one list, so that one copy transfers them."""

    def __init__(
        self, decode: Sequence[TokenRange], prefill: Sequence[TokenRange], *, null_slot: int, pad_decode_to: int = 0
    ) -> None:
        decode = [*decode, *[TokenRange(null_slot, 0, [0])] * (pad_decode_to - len(decode))]
        ranges = [*decode, *prefill]
        positions = [p for r in ranges for p in range(r.start, r.kv_len)]
        kv_offsets = [r.kv_offset for r in ranges for _ in r.token_ids]
        self.groups = [AttentionGroup(decode), AttentionGroup(prefill)]
        self.values = [
            *(t for r in ranges for t in r.token_ids),
            *positions,
            *(kv_offset + position for kv_offset, position in zip(kv_offsets, positions, strict=True)),
            *(value for group in self.groups for value in group.values),
        ]
        self.sizes = [len(positions)] * 3 + [size for group in self.groups for size in group.sizes]


class ContiguousStep:
    """A step over a contiguous KV cache (`decoder.Step`)."""

    def __init__(
        self, cache: ContiguousKVCache, metadata: StepMetadata, on_device: Tensor, *, num_splits: int | None = None
    ) -> None:
        """Take the metadata's values on the device; `num_splits` applies to the decode group (`split_kv`)."""
        self._cache = cache
        self._num_splits = num_splits
        self.token_ids, self.positions, self._slots, *rest = on_device.split(metadata.sizes)
        of_groups = zip(metadata.groups, (rest[:3], rest[3:]), strict=True)
        self._groups = [(group, tensors) for group, tensors in of_groups if group.q_lens]
        self._tokens_of_groups = [sum(group.q_lens) for group, _ in self._groups]

    def attend(self, layer: int, q: Tensor, kv: Tensor, scaling: float) -> Tensor:
        """See `decoder.Step.attend`."""
        if layer == 0:  # converted once: otherwise every layer would convert the index from 32 to 64 bits
            self._slots_int64 = self._slots.long()
        self._cache.by_token[layer].index_put_((self._slots_int64,), kv)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        outputs = []
        for (group, tensors), queries in zip(self._groups, q.split(self._tokens_of_groups), strict=True):
            if self._cache.flash:
                outputs.append(self._attend_flash(group, tensors, queries, keys, values, scaling))
            else:
                outputs += self._attend_plain(group, queries, keys, values, scaling)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).reshape(len(q), -1)

    def _attend_flash(
        self, group: AttentionGroup, tensors: Sequence[Tensor], q: Tensor, keys: Tensor, values: Tensor, scaling: float
    ) -> Tensor:
        cu_seqlens_q, cu_seqlens_k, kv_lens = tensors
        window: tuple[int, int]
        if self._cache.window is not None:
            window = (self._cache.window - 1, 0)
        else:  # a single query sees all keys; without the causal mask, the kernel can pack the heads of a group
            window = (-1, -1) if group.max_q == 1 else (-1, 0)
        return varlen_attn(
            q,
            keys,
            values,
            cu_seqlens_q,
            cu_seqlens_k,
            group.max_q,
            self._cache.max_sequence_tokens,
            scale=scaling,
            window_size=window,
            seqused_k=kv_lens,
            num_splits=self._num_splits if window == (-1, -1) else None,
        )

    def _attend_plain(
        self, group: AttentionGroup, q: Tensor, keys: Tensor, values: Tensor, scaling: float
    ) -> list[Tensor]:
        """Return the attention output of each sequence in turn: the reference for flash attention."""
        return [
            chunk_attention(
                queries,
                keys[kv_offset : kv_offset + kv_len].transpose(0, 1),
                values[kv_offset : kv_offset + kv_len].transpose(0, 1),
                kv_len - len(queries),
                scaling,
                self._cache.window,
            )
            for queries, kv_offset, kv_len in zip(q.split(group.q_lens), group.kv_offsets, group.kv_lens, strict=True)
        ]
