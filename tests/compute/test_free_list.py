"""The free list: regions never overlap, merge when freed, and follow the documented placement."""

from __future__ import annotations

import random

from model_server.compute.kv_cache.free_list import FreeListAllocator


def test_regions_never_overlap_and_merge_when_freed() -> None:
    """Compares a thousand random requests with a map of every token: next-fit while most is free, else best-fit."""
    numbers = random.Random(0)
    free_list = FreeListAllocator(500)
    allocated: dict[int, int] = {}
    last_end = 0
    for _ in range(1000):
        if allocated and numbers.random() < 0.5:
            start = numbers.choice(list(allocated))
            free_list.free(start, allocated.pop(start))
            continue
        length = numbers.randint(1, 120)
        used = {token for start, size in allocated.items() for token in range(start, start + size)}
        fitting = [start for start in range(500 - length + 1) if used.isdisjoint(range(start, start + length))]
        if len(used) < 500 / 3:
            expected = min(fitting, key=lambda token: (token < last_end, token), default=None)
        else:
            firsts = [token for token in fitting if token == 0 or token - 1 in used]
            ends = {token: next(end for end in range(token, 501) if end == 500 or end in used) for token in firsts}
            expected = min(firsts, key=lambda token: ends[token] - token, default=None)
        start = free_list.allocate(length)
        assert start == expected
        if start is not None:
            allocated[start] = length
            last_end = start + length if len(used) < 500 / 3 else last_end
    for start, length in allocated.items():
        free_list.free(start, length)
    assert free_list.allocate(500) == 0


def test_copy_is_independent() -> None:
    free_list = FreeListAllocator(10)
    other = free_list.copy()

    other.allocate(10)

    assert free_list.allocate(10) == 0
