"""The prefix cache: finds the longest prefix of a prompt whose keys and values the KV cache holds.

The keys and values of a token depend only on it and the tokens before it. A new sequence can therefore copy them from
any region of the KV cache that begins with the same tokens. The region of a finished sequence stays valid until it is
allocated again, so the prefix cache needs no memory for keys and values. It knows neither tensors nor requests.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

MIN_PREFIX_TOKENS = 16
"""Shorter prefixes are computed, which is faster than copying them. All prompts share the start of a chat template."""


class PrefixCache:
    """The regions of the KV cache that hold reusable keys and values."""

    def __init__(self) -> None:
        self._regions: dict[int, Sequence[int]] = {}
        """Maps the offset of a region to the tokens whose keys and values it holds."""

    def insert(self, kv_offset: int, token_ids: Sequence[int]) -> None:
        """Set the tokens that the region at this offset holds."""
        self._regions[kv_offset] = token_ids

    def invalidate(self, kv_offset: int, length: int) -> None:
        """Remove the regions that will be overwritten; truncate a region that starts before `kv_offset`."""
        end = kv_offset + length
        for start, token_ids in list(self._regions.items()):
            if start < kv_offset < start + len(token_ids):
                self._regions[start] = token_ids[: kv_offset - start]
            elif kv_offset <= start < end:
                del self._regions[start]

    def clear(self) -> None:
        self._regions.clear()

    def match_prefix(self, token_ids: Sequence[int], destination: int) -> tuple[int, int]:
        """Return the offset of the region with the longest common prefix, and the length of that prefix.

        The caller copies the prefix to `destination`. The prefix is limited to the distance between region and
        destination, so the copy never overlaps its source.
        """
        source, longest = destination, 0
        for start, cached in self._regions.items():
            limit = min(len(cached), len(token_ids), abs(start - destination) or len(cached))
            if limit > longest and cached[longest] == token_ids[longest]:
                common = common_prefix_length(cached[:limit], token_ids)
                if common > longest:
                    source, longest = start, common
        return source, longest


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two token sequences."""
    differ = map(operator.ne, one, other)
    return next(itertools.compress(itertools.count(), differ), min(len(one), len(other)))
