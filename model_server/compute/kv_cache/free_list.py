"""A free list over a pool of tokens: allocates contiguous regions and merges adjacent regions when they are freed."""

from __future__ import annotations

import bisect

NEXT_FIT_ABOVE = 2 / 3
"""The allocator is next-fit while more than this share of the pool is free, and best-fit below it."""


class FreeListAllocator:
    """The free regions of a pool.

    While most of the pool is free, the allocator is next-fit: a new region begins at the end of the last one, so the
    keys and values of finished sequences survive as long as possible for the prefix cache. When the pool fills up, it
    is best-fit: it takes the smallest region that is long enough, so that long regions stay whole for long sequences.
    """

    def __init__(self, num_tokens: int) -> None:
        self._free = [(0, num_tokens)]
        """(start, length) of each free region, in ascending order; no two regions are adjacent."""
        self._num_tokens = num_tokens
        self._next = 0
        """The end of the last region that was allocated next-fit."""

    def copy(self) -> FreeListAllocator:
        other = FreeListAllocator(self._num_tokens)
        other._free, other._next = list(self._free), self._next
        return other

    def allocate(self, length: int) -> int | None:
        """Allocate a region of this length and return its start, or None if no free region is long enough."""
        fitting = [(i, first, first + free) for i, (first, free) in enumerate(self._free) if free >= length]
        if not fitting:
            return None
        if sum(free for _, free in self._free) > NEXT_FIT_ABOVE * self._num_tokens:
            ahead = ((i, max(first, self._next)) for i, first, end in fitting if end - self._next >= length)
            i, start = next(ahead, fitting[0][:2])
            self._next = start + length
        else:
            i, start, _ = min(fitting, key=lambda region: region[2] - region[1])
        first, free = self._free[i]
        rest = ((first, start - first), (start + length, first + free - start - length))
        self._free[i : i + 1] = [region for region in rest if region[1]]
        return start

    def free(self, start: int, length: int) -> None:
        """Free a region and merge it with its free neighbours."""
        free = list(self._free)
        i = bisect.bisect(free, (start, 0))
        if i < len(free) and free[i][0] == start + length:
            length += free.pop(i)[1]
        if i and sum(free[i - 1]) == start:
            before, more = free.pop(i - 1)
            start, length, i = before, more + length, i - 1
        free.insert(i, (start, length))
        # A single assignment: the event loop copies the list in another thread and must not see a partial change.
        self._free = free
