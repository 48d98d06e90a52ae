"""Split-KV for decode attention: measures at startup into how many parts to split the keys of a long sequence.

FlashAttention's own choice depends on the maximum sequence length, not on the running sequences. With a batch of 16 or
more, it does not split, and one long sequence then delays the step. Only a decode group without a sliding window can be
split. Splits are never combined with a block table, which would leave the output of all sequences but the first
unwritten (pytorch/pytorch#194167).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model_server.compute.gpu.host_device import to_device
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache, ContiguousStep, StepMetadata
from model_server.compute.kv_cache.flash_check import TOLERANCE

log = logging.getLogger(__name__)

OPTIONS = (None, 2, 4, 8)
"""The numbers of splits to measure; None leaves the choice to FlashAttention."""
MIN_GAIN = 0.03
"""The share by which a number of splits must be faster than FlashAttention's own choice."""
WARM_UP_CALLS, TIMED_CALLS = 3, 20
HEAD_START_CYCLES = 10**7
"""The device sleeps for 5 to 6 ms while the host launches the timed calls: launching takes longer than running."""


def choose_num_splits(
    cache: ContiguousKVCache,
    batch_sizes: Sequence[int],
    num_heads: int,
    *,
    measure_ms: Callable[[Callable[[], object]], float] | None = None,
) -> dict[int, int | None]:
    """Return the fastest number of splits for each batch size; call it while the cache is empty.

    Each measured batch has one sequence of the maximum length; the others have an eighth of that length.

    Args:
        measure_ms: returns the time of a call in milliseconds.
    """
    if cache.window is not None:
        return dict.fromkeys(batch_sizes)
    began_s = time.monotonic()
    measure_ms = measure_ms or measure_on_gpu
    generator = torch.Generator(cache.device).manual_seed(0)
    first_layer = cache.by_token[0].normal_(generator=generator)
    chosen = {size: _fastest(cache, size, num_heads, generator, measure_ms) for size in batch_sizes}
    first_layer.zero_()
    log.info(
        "attention: split-KV by batch size %s (measured in %.0f ms)",
        ", ".join(f"{size}: {splits or 'auto'}" for size, splits in chosen.items()),
        1000 * (time.monotonic() - began_s),
    )
    return chosen


@torch.inference_mode()
def _fastest(
    cache: ContiguousKVCache,
    batch_size: int,
    num_heads: int,
    generator: torch.Generator,
    measure_ms: Callable[[Callable[[], object]], float],
) -> int | None:
    """Return the fastest option whose output is right."""
    kv_heads, size = cache.keys[0].shape[1:]
    numbers = torch.randn(
        (batch_size, num_heads + 2 * kv_heads, size),
        dtype=cache.keys[0].dtype,
        device=cache.device,
        generator=generator,
    )
    calls = {option: _attention_call(cache, numbers, num_heads, option) for option in OPTIONS}
    expected = calls[None]()
    tolerance = TOLERANCE[expected.dtype]
    times_ms = {
        option: measure_ms(call)
        for option, call in calls.items()
        if option is None or _is_right(call, expected, tolerance)
    }
    fastest = min(times_ms, key=times_ms.__getitem__)
    return fastest if times_ms[fastest] < (1 - MIN_GAIN) * times_ms[None] else None


def _is_right(call: Callable[[], Tensor], expected: Tensor, tolerance: float) -> bool:
    try:
        return float((call() - expected).abs().max()) < tolerance
    except torch.AcceleratorError:
        raise
    except RuntimeError:  # this kernel does not split
        return False


def _attention_call(
    cache: ContiguousKVCache, numbers: Tensor, num_heads: int, num_splits: int | None
) -> Callable[[], Tensor]:
    batch_size, size = len(numbers), numbers.shape[-1]
    longest = min(cache.max_sequence_tokens, cache.num_tokens)
    lengths = [longest, *[max(1, longest // 8)] * (batch_size - 1)]
    # Sequences are spread over the pool: keys that several sequences share would come from the L2 cache.
    offsets = [i * (cache.num_tokens - length) // batch_size for i, length in enumerate(lengths)]
    decode = [TokenRange(offset, length - 1, [0]) for offset, length in zip(offsets, lengths, strict=True)]
    metadata = StepMetadata(decode, [], null_slot=cache.null_slot)
    on_device = to_device(metadata.values, cache.device, torch.int32)
    step = ContiguousStep(cache, metadata, on_device, num_splits=num_splits)
    # All sequences write the same keys and values: if two write to the same token, their order on a GPU is undefined.
    q, kv = numbers[:, :num_heads], numbers[:1, num_heads:].unflatten(1, (2, -1)).expand(batch_size, -1, -1, -1)
    return lambda: step.attend(0, q, kv, size**-0.5)


@torch.inference_mode()
def measure_on_gpu(call: Callable[[], object]) -> float:
    """Return the time of one call in milliseconds, measured with CUDA events."""
    for _ in range(WARM_UP_CALLS):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    for _ in range(TIMED_CALLS):
        call()
    end.record()
    end.synchronize()
    elapsed_ms: float = begin.elapsed_time(end)
    return elapsed_ms / TIMED_CALLS
