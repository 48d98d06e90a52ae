"""The prefix cache: the tokens whose keys and values the KV cache holds, and the longest prefix of a prompt among them.

A token's keys and values depend only on the tokens before it, so a new sequence can copy them from any region of the KV
cache that begins with the same tokens. The region of a finished sequence stays valid until it is allocated again, so
the prefix cache takes no memory of its own. It knows neither tensors nor requests.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

MIN_PREFIX_TOKENS = 16
"""Computing fewer is faster than looking them up: all prompts share the first words of a chat template."""


class PrefixCache:
    """Regions of the KV cache by their first token."""

    def __init__(self) -> None:
        self._regions: dict[int, Sequence[int]] = {}
        """Offset of a region to the tokens whose keys and values it holds."""

    def insert(self, kv_offset: int, token_ids: Sequence[int]) -> None:
        """Set the tokens that the region at this offset holds."""
        self._regions[kv_offset] = token_ids

    def invalidate(self, kv_offset: int, length: int) -> None:
        """Forget what will be overwritten; a region that starts before `kv_offset` is cut there."""
        end = kv_offset + length
        for start, token_ids in list(self._regions.items()):
            if start < kv_offset < start + len(token_ids):
                self._regions[start] = token_ids[: kv_offset - start]
            elif kv_offset <= start < end:
                del self._regions[start]

    def clear(self) -> None:
        self._regions.clear()

    def match_prefix(self, token_ids: Sequence[int], destination: int) -> tuple[int, int]:
        """Return the offset of the region with the longest common prefix, and the prefix's length.

        The prefix is to be copied to `destination`. A region that overlaps the destination is cut there, so the copy is
        safe.
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
    """Return the number of tokens that two sequences have in common from the start."""
    differ = map(operator.ne, one, other)
    return next(itertools.compress(itertools.count(), differ), min(len(one), len(other)))
