"""Flash attention at Mistral 7B's shape equals float32 arithmetic; the pool holds NaN between the sequences."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MistralConfig

from model_server.compute.attention import chunk_attention
from model_server.compute.gpu.host_device import to_device
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache, ContiguousStep, StepMetadata
from model_server.compute.kv_cache.flash_check import TOLERANCE
from model_server.compute.kv_cache.split_kv import OPTIONS, measure_on_gpu

NUM_HEADS, KV_HEADS, HEAD_DIM, MAX_TOKENS, GAP = 32, 8, 128, 4096, 13
BATCH_SIZES = [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 32]
LENGTHS = [1, 127, 128, 129, 255, 256, 257, 640, 896, 897, 2048, 4000]
CHUNKS = [(0, 5), (1, 64), (100, 129), (127, 1), (128, 128), (1000, 512), (3000, 300)]
"""The number of prompt tokens before a chunk, and in it."""
SCALING = HEAD_DIM**-0.5


class Step:
    """One layer's attention for a step: decoding sequences of these lengths, and prompt chunks."""

    def __init__(
        self,
        device: torch.device,
        lengths: Sequence[int],
        chunks: Sequence[tuple[int, int]] = (),
        window: int | None = None,
    ) -> None:
        config = MistralConfig(
            num_hidden_layers=1, num_attention_heads=NUM_HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM
        )
        config.sliding_window = window
        sizes = [(length - 1, 1) for length in lengths] + list(chunks)
        offsets = [GAP, *(GAP + end for end in itertools.accumulate(start + count + GAP for start, count in sizes))]
        self.cache = ContiguousKVCache(
            config,
            num_tokens=offsets[-1],
            max_sequence_tokens=MAX_TOKENS,
            dtype=torch.float16,
            device=device,
            flash=True,
        )
        self.cache.by_token[0].fill_(torch.nan)
        self.ranges = [
            TokenRange(offset, start, [0] * count) for offset, (start, count) in zip(offsets, sizes, strict=False)
        ]
        for r in self.ranges:
            self.cache.by_token[0][r.kv_offset : r.kv_offset + r.start].normal_()
        self.metadata = StepMetadata(self.ranges[: len(lengths)], self.ranges[len(lengths) :], null_slot=0)
        self._on_device = to_device(self.metadata.values, device, torch.int32)
        shape = (sum(count for _, count in sizes), NUM_HEADS + 2 * KV_HEADS, HEAD_DIM)
        numbers = torch.randn(shape, dtype=torch.float16, device=device)
        self.q, self.kv = numbers[:, :NUM_HEADS], numbers[:, NUM_HEADS:].unflatten(1, (2, -1))

    def attention(self, num_splits: int | None = None) -> Callable[[], Tensor]:
        step = ContiguousStep(self.cache, self.metadata, self._on_device, num_splits=num_splits)
        return lambda: step.attend(0, self.q, self.kv, SCALING)

    def error(self, num_splits: int | None = None) -> float:
        """Return the largest difference from float32 arithmetic; NaN if a key outside a sequence was read."""
        out = self.attention(num_splits)().view_as(self.q)
        expected = []
        for r, q in zip(self.ranges, self.q.float().split([len(r.token_ids) for r in self.ranges]), strict=True):
            keys, values = self.cache.by_token[0][r.kv_offset :][: r.kv_len].float().permute(1, 2, 0, 3)
            expected.append(chunk_attention(q, keys, values, r.start, SCALING, self.cache.window))
        return float((out - torch.cat(expected)).abs().max())


def wrong(step: Step, num_splits: int | None = None) -> bool:
    try:
        return not step.error(num_splits) < TOLERANCE[torch.float16]
    except torch.AcceleratorError:
        raise
    except RuntimeError:
        return num_splits is None  # a kernel that cannot split raises, and the server does not set `num_splits`


def batches(device: torch.device) -> list[list[int]]:
    """Return the sequence lengths for each batch size: all boundary lengths, in a different order for each size."""
    sizes, lengths = (BATCH_SIZES, LENGTHS) if device.type == "cuda" else ([1, 3], LENGTHS[:5])
    return [[lengths[(size + i) % len(lengths)] for i in range(size)] for size in sizes]


@torch.inference_mode()
def test_decoding_at_every_batch_size_and_block_border(
    device: torch.device, figure: Callable[[str, Any], None]
) -> None:
    failures, rates = [], {}
    for lengths, window in itertools.product(batches(device), (None, 35)):
        step = Step(device, lengths, window=window)
        options = OPTIONS if window is None else (None,)
        failures += [(len(lengths), window, splits) for splits in options if wrong(step, splits)]
        if window is None:
            num_bytes = sum(lengths) * 2 * KV_HEADS * HEAD_DIM * 2
            rates[len(lengths)] = round(num_bytes / measure_on_gpu(step.attention()) / 1e6, 1)
    figure("decode attention, GB/s by batch size", rates)

    assert failures == [], "(batch size, window, num_splits)"


@torch.inference_mode()
def test_prompt_chunks_at_every_border_beside_decoding_sequences(device: torch.device) -> None:
    chunks = CHUNKS if device.type == "cuda" else CHUNKS[:3]
    steps = {
        (beside, window): Step(device, [129, 300][:beside], chunks, window)
        for beside in (0, 2)
        for window in (None, 35)
    }

    assert [case for case, step in steps.items() if wrong(step)] == [], "(decoding sequences, window)"
