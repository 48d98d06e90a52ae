"""KV memory as spans: each row takes exactly the tokens it may need from one pool, side by side. For a GPU.

Owns the pool, which tokens of it are free, and attention over spans. A row's span is as long as its prompt and answer
can get, so that 24 GB hold many usual requests instead of a few of the longest. Being in one piece it needs no tables,
and PyTorch's own flash attention reads it (`torch.nn.attention.varlen`): its rows of keys may begin anywhere.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import MistralConfig

from model_server.compute.attention import chunk_attention
from model_server.compute.host_device import to_device
from model_server.compute.kv_cache.base import TokenRange, head_dim, window_of

IN_TURN = 2 / 3
"""How much of a pool must be free for it to be taken in turn. Emptier pools have long stretches all the same."""


class FreeListAllocator:
    """What is free of a pool of tokens; neighbours join again when they are given back.

    While most of the pool is free it is taken in turn, on from where the last span ended: what rows have left stays
    readable for as long as can be (`prefixes.py`). When it fills, a row gets the smallest stretch that is long enough,
    so that long stretches stay whole for long rows.
    """

    def __init__(self, num_tokens: int) -> None:
        self._free = [(0, num_tokens)]
        """Start and length of each free stretch, by start; no two touch."""
        self._num_tokens = num_tokens
        self._next = 0
        """Where the last span ended that was taken in turn."""

    def copy(self) -> FreeListAllocator:
        other = FreeListAllocator(self._num_tokens)
        other._free, other._next = list(self._free), self._next
        return other

    def allocate(self, length: int) -> int | None:
        """Take a stretch of this length; return its start, or None when there is none."""
        fitting = [(i, first, first + free) for i, (first, free) in enumerate(self._free) if free >= length]
        if not fitting:
            return None
        if sum(free for _, free in self._free) > IN_TURN * self._num_tokens:
            ahead = ((i, max(first, self._next)) for i, first, end in fitting if end - self._next >= length)
            i, start = next(ahead, fitting[0][:2])
            self._next = start + length
        else:
            i, start, _ = min(fitting, key=lambda stretch: stretch[2] - stretch[1])
        first, free = self._free[i]
        rest = ((first, start - first), (start + length, first + free - start - length))
        self._free[i : i + 1] = [stretch for stretch in rest if stretch[1]]
        return start

    def free(self, start: int, length: int) -> None:
        free = list(self._free)
        i = bisect.bisect(free, (start, 0))
        if i < len(free) and free[i][0] == start + length:
            length += free.pop(i)[1]
        if i and sum(free[i - 1]) == start:
            before, more = free.pop(i - 1)
            start, length, i = before, more + length, i - 1
        free.insert(i, (start, length))
        # In one go: the event loop counts what is free while the shared lane gives back, and must not see half of it.
        self._free = free


class ContiguousKVCache:
    """Keys and values of all layers: for each layer a pair of (num_tokens + 1, kv_heads, head_dim).

    The last token belongs to nobody: what only fills up a step is written there.
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
        """Make the pool; `flash` says whether flash attention is to be used (see `flash_refusal`) or plain PyTorch."""
        self.num_tokens = num_tokens
        self.max_sequence_tokens = max_sequence_tokens
        self.device = device
        self.flash = flash
        self.window = window_of(config, max_sequence_tokens)
        shape = (config.num_hidden_layers, 2, num_tokens + 1, config.num_key_value_heads, head_dim(config))
        # Zeros and not garbage: what the kernel reads beyond a row's end is masked, but 0 x NaN is NaN.
        memory = torch.zeros(shape, dtype=dtype, device=device)
        self._memory = memory
        self.keys: list[Tensor] = [memory[layer, 0] for layer in range(config.num_hidden_layers)]
        self.values: list[Tensor] = [memory[layer, 1] for layer in range(config.num_hidden_layers)]
        self.by_token = memory.transpose(1, 2).unbind()
        """The same seen as it is written: for each layer (num_tokens + 1, 2, kv_heads, head_dim)."""
        self._free = FreeListAllocator(num_tokens)
        self._lengths: dict[int, int] = {}
        """Start of each taken span to its length."""

    def allocate(self, num_tokens: int) -> int | None:
        place = self._free.allocate(num_tokens)
        if place is not None:
            self._lengths[place] = num_tokens
        return place

    def free(self, place: int) -> None:
        self._free.free(place, self._lengths.pop(place))

    def copy(self, source: int, place: int, num_tokens: int) -> None:
        self._memory[:, :, place : place + num_tokens] = self._memory[:, :, source : source + num_tokens]

    def num_allocatable(self, rows: Iterable[int]) -> int:
        free, count = self._free.copy(), 0
        for num_tokens in rows:
            if free.allocate(num_tokens) is None:
                break
            count += 1
        return count

    def release_unused(self) -> bool:
        return False  # the GPU is ours alone

    def step(self, decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> SpanStep:
        numbers = StepMetadata(decode, prefill, unused=self.num_tokens)
        return SpanStep(self, numbers, to_device(numbers.values, self.device, torch.int32))


class Part:
    """The segments of a step that one attention call serves: those that decode, or those that read their prompt."""

    def __init__(self, segments: Sequence[TokenRange]) -> None:
        self.places = [s.place for s in segments]
        self.lengths = [len(s.token_ids) for s in segments]
        self.ends = [s.start + len(s.token_ids) for s in segments]
        # Bounds of the queries, starts of the keys (the kernel wants the end of the last one too, and does not use
        # it), and how many keys there are.
        self.values = [*itertools.accumulate(self.lengths, initial=0), *self.places, 0, *self.ends]
        self.sizes = [len(segments) + 1, len(segments) + 1, len(segments)]


class StepMetadata:
    """All that a step tells the device, in one list, so that it gets there in one copy."""

    def __init__(
        self, decode: Sequence[TokenRange], prefill: Sequence[TokenRange], *, unused: int, pad_decode_to: int = 0
    ) -> None:
        decode = [*decode, *[TokenRange(unused, 0, [0])] * (pad_decode_to - len(decode))]
        segments = [*decode, *prefill]
        positions = [p for s in segments for p in range(s.start, s.start + len(s.token_ids))]
        places = [s.place for s in segments for _ in s.token_ids]
        self.parts = [Part(decode), Part(prefill)]
        self.values = [
            *(t for s in segments for t in s.token_ids),
            *positions,
            *(place + position for place, position in zip(places, positions, strict=True)),
            *(value for part in self.parts for value in part.values),
        ]
        self.sizes = [len(positions)] * 3 + [size for part in self.parts for size in part.sizes]


class SpanStep:
    """A step over spans (`decoder.Step`)."""

    def __init__(self, spans: ContiguousKVCache, numbers: StepMetadata, on_device: Tensor) -> None:
        self._spans = spans
        self.token_ids, self.positions, self._writes, *rest = on_device.split(numbers.sizes)
        of_parts = zip(numbers.parts, (rest[:3], rest[3:]), strict=True)
        self._parts = [(part, tensors) for part, tensors in of_parts if part.lengths]
        self._tokens_of_parts = [sum(part.lengths) for part, _ in self._parts]

    def attend(self, layer: int, q: Tensor, kv: Tensor, scaling: float) -> Tensor:
        """See `decoder.Step.attend`."""
        if layer == 0:  # in every layer, an index of 32 bits would be made one of 64
            self._rows = self._writes.long()
        self._spans.by_token[layer].index_put_((self._rows,), kv)
        keys, values = self._spans.keys[layer], self._spans.values[layer]
        found = []
        for (part, tensors), queries in zip(self._parts, q.split(self._tokens_of_parts), strict=True):
            if self._spans.flash:
                found.append(self._attend_flash(part, tensors, queries, keys, values, scaling))
            else:
                found += self._attend_plain(part, queries, keys, values, scaling)
        return (found[0] if len(found) == 1 else torch.cat(found)).reshape(len(q), -1)

    def _attend_flash(
        self, part: Part, tensors: Sequence[Tensor], q: Tensor, keys: Tensor, values: Tensor, scaling: float
    ) -> Tensor:
        bounds, starts, num_keys = tensors
        max_q = max(part.lengths)
        if self._spans.window is not None:
            seen = (self._spans.window - 1, 0)
        else:
            # One query sees all its keys: saying so, instead of "causal", lets the kernel put the heads of a group
            # together and share a long row out.
            seen = (-1, -1) if max_q == 1 else (-1, 0)
        out = varlen_attn(
            q,
            keys,
            values,
            bounds,
            starts,
            max_q,
            self._spans.max_sequence_tokens,
            scale=scaling,
            window_size=seen,
            enable_gqa=True,
            seqused_k=num_keys,
        )
        assert isinstance(out, Tensor), "nothing else was asked for"
        return out

    def _attend_plain(self, part: Part, q: Tensor, keys: Tensor, values: Tensor, scaling: float) -> list[Tensor]:
        """Row by row: what flash attention is held against."""
        return [
            chunk_attention(
                queries,
                keys[place : place + end].transpose(0, 1),
                values[place : place + end].transpose(0, 1),
                end - len(queries),
                scaling,
                self._spans.window,
            )
            for queries, place, end in zip(q.split(part.lengths), part.places, part.ends, strict=True)
        ]


def flash_attention_unavailable_reason(config: MistralConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why spans cannot be read by flash attention here, or None when they can, and are read right.

    Asked of the device itself, with small steps held against plain attention: which cards, formats and head sizes a
    kernel serves is written nowhere as surely.
    """
    if device.type != "cuda":
        return f"the device is a {device.type}"
    return verify_flash_attention(config, dtype, device)


@torch.inference_mode()
def verify_flash_attention(config: MistralConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return what is written or read otherwise than it should be, or None.

    What plain attention finds over the same spans is what flash attention must find; and since a wrong write would be
    read by both, what was written is looked up.
    """
    num_heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
    one_layer = MistralConfig(
        num_hidden_layers=1, num_attention_heads=num_heads, num_key_value_heads=kv_heads, head_dim=size
    )
    one_layer.sliding_window = config.sliding_window and 35  # where there is a window, a small one that shows
    numbers = torch.Generator(device).manual_seed(0)

    def random(rows: int, heads: int) -> Tensor:
        return torch.randn((rows, heads, size), dtype=dtype, device=device, generator=numbers)

    spans = ContiguousKVCache(
        one_layer, num_tokens=512, max_sequence_tokens=300, dtype=dtype, device=device, flash=True
    )
    spans.keys[0].copy_(random(513, kv_heads))
    spans.values[0].copy_(random(513, kv_heads))
    decode = [TokenRange(300, 40, [0]), TokenRange(7, 99, [0])]
    prefill = [TokenRange(200, 20, [0] * 30), TokenRange(400, 0, [0] * 5)]
    try:
        for segments in ((decode, []), ([], prefill), (decode, prefill)):
            step = spans.step(*segments)
            written = [s.place + s.start + i for part in segments for s in part for i in range(len(s.token_ids))]
            q, kv = random(len(written), num_heads), random(len(written), 2 * kv_heads).unflatten(1, (2, kv_heads))
            found = {}
            for spans.flash in (True, False):
                found[spans.flash] = step.attend(0, q, kv, size**-0.5)
            held = torch.stack((spans.keys[0][written], spans.values[0][written]), 1)
            if not torch.equal(held, kv):
                return "keys and values are not written where they are read"
            difference = float((found[True] - found[False]).abs().max())
            if not difference < 0.02:
                return f"its answers differ from plain attention's by {difference:.2g}"
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    return None
