"""Prompt lookup: drafts a sequence's next tokens from its own prompt and output.

A step computes the drafted tokens after the latest token, and `verification.py` samples every token from the model's
logits. A wrong draft costs time and changes no token. This module knows neither device tensors nor the batch.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
from numpy.typing import NDArray

from model_server.request import SamplingParams

MAX_NGRAM_SIZE = 2
"""The default of `max_matching_ngram_size` in `generate`."""
GROWTH = 3
"""Drafted tokens for each right guess in a row, up to the number that the request allows.

A CPU computes four tokens in the time of one, so the three tokens drafted after the first right guess are free."""


class PromptLookup:
    """Drafts the tokens that followed an earlier occurrence of the sequence's last tokens.

    The source of the drafts is the same as in `generate`: the token after the earliest occurrence of the longest n-gram
    of the last tokens. While the guesses are right, the source advances token by token.

    Every step guesses the next token and compares the guess with the token that the model has chosen. A step computes
    drafts only after a right guess: in a text that does not repeat, nearly all drafts would be wrong.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        num_tokens: int,
        max_ngram_size: int = MAX_NGRAM_SIZE,
        eos_token_ids: Container[int] = (),
    ) -> None:
        """Start with a prompt; a draft has at most `num_tokens` tokens."""
        self._ids: NDArray[np.int64] = np.empty(len(prompt_ids) + max_new_tokens, np.int64)
        self._length = len(prompt_ids)
        self._ids[: self._length] = prompt_ids
        self._num_tokens = num_tokens
        self._max_ngram_size = max_ngram_size
        self._eos_token_ids = eos_token_ids
        self._num_right = 0
        """Guesses in a row that were right, up to the latest token."""
        self._source = find_source(self._ids[: self._length], max_ngram_size)
        """The index of the guess for the next token; None without a guess."""

    @property
    def is_confident(self) -> bool:
        """Whether the last guess was right, so that a draft is worth a step's time."""
        return self._num_right > 0

    def append(self, token_id: int) -> None:
        """Append the token that the model has chosen and compare it with the guess."""
        right = self._source is not None and self._ids[self._source] == token_id
        self._ids[self._length] = token_id
        self._length += 1
        if self._source is not None and right:
            self._num_right += 1
            self._source += 1
        else:
            self._num_right = 0
            self._source = find_source(self._ids[: self._length], self._max_ngram_size)

    def draft(self, limit: int) -> list[int]:
        """Return up to `limit` drafted tokens; none unless `is_confident`.

        At the end of the text, the draft continues with its own tokens, so it follows a loop of any length. The draft
        ends before an end-of-sequence token.
        """
        if self._source is None or not self.is_confident:
            return []
        num_tokens = min(limit, self._num_tokens, GROWTH * self._num_right)
        source: list[int] = self._ids[self._source : min(self._source + num_tokens, self._length)].tolist()
        guessed: list[int] = []
        for i in range(num_tokens):
            token_id = source[i] if i < len(source) else guessed[i - len(source)]
            if token_id in self._eos_token_ids:
                break
            guessed.append(token_id)
        return guessed


def prompt_lookup(
    prompt_ids: Sequence[int], sampling: SamplingParams, eos_token_ids: Container[int]
) -> PromptLookup | None:
    """Return a prompt lookup if the request asks for one, else None."""
    num_tokens = sampling.generate.get("prompt_lookup_num_tokens")
    if num_tokens is None:
        return None
    return PromptLookup(
        prompt_ids,
        max_new_tokens=sampling.max_new_tokens,
        num_tokens=num_tokens,
        max_ngram_size=sampling.generate.get("max_matching_ngram_size") or MAX_NGRAM_SIZE,
        eos_token_ids=eos_token_ids,
    )


def find_source(ids: NDArray[np.int64], max_ngram_size: int) -> int | None:
    """Return the index after the earliest occurrence of the longest n-gram that ends the text, or None.

    An n-gram has up to `max_ngram_size` tokens. The occurrence at the end of the text does not count.
    """
    last = len(ids) - 1
    ends = np.flatnonzero(ids[:last] == ids[last])
    if not len(ends):
        return None
    for size in range(2, min(max_ngram_size, last) + 1):
        longer = ends[ends >= size - 1]
        longer = longer[ids[longer - size + 1] == ids[last - size + 1]]
        if not len(longer):
            break
        ends = longer
    return int(ends[0]) + 1
