"""Prompts that begin alike are read once: what lies in the KV memory, and which of it a new prompt can use.

A token's keys and values depend on the tokens before it and on nothing else, so what one row has read serves every
row that begins the same way; it is copied there. A row's keys and values stay where they were when it has left, until
the memory is given to another row: what is kept costs nothing. Knows neither tensors nor requests.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

MIN_TOKENS = 16
"""Fewer are read faster than looked for: a chat template's first words are common to all."""


class PrefixCache:
    """Which tokens' keys and values each stretch of the memory holds, for a row from its first token on."""

    def __init__(self) -> None:
        self._held: dict[int, Sequence[int]] = {}
        """Start of a stretch, in tokens of the memory, to the tokens there."""

    def hold(self, start: int, token_ids: Sequence[int]) -> None:
        """Note what a row's stretch holds by now."""
        self._held[start] = token_ids

    def forget(self, start: int, length: int) -> None:
        """Note that a stretch will be written over: what began before it keeps its beginning."""
        end = start + length
        for at, token_ids in list(self._held.items()):
            if at < start < at + len(token_ids):
                self._held[at] = token_ids[: start - at]
            elif start <= at < end:
                del self._held[at]

    def clear(self) -> None:
        self._held.clear()

    def longest(self, token_ids: Sequence[int], start: int) -> tuple[int, int]:
        """Return where most of the beginning of `token_ids` is held, and how many tokens of it.

        They are to be copied to `start`: of a stretch that reaches into their new place only the part before counts.
        """
        source, longest = start, 0
        for at, held in self._held.items():
            within = min(len(held), len(token_ids), abs(at - start) or len(held))
            if within > longest and held[longest] == token_ids[longest]:
                common = num_common(held[:within], token_ids)
                if common > longest:
                    source, longest = at, common
        return source, longest


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows have in common, from the first on."""
    differ = map(operator.ne, one, other)
    return next(itertools.compress(itertools.count(), differ), min(len(one), len(other)))
