"""Prompt lookup: guesses at a sequence's next tokens, taken from its own prompt and output.

A step computes the guessed tokens behind the latest one, and the model then chooses every token from its own logits
(`verification.py`). A wrong guess costs time and changes nothing. Knows neither tensors of the device nor the batch.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
from numpy.typing import NDArray

from model_server.request import SamplingParams

MAX_NGRAM_SIZE = 2
"""The default of `max_matching_ngram_size` in `generate`."""
GROWTH = 3
"""Guesses for each right one before, up to the number that the request allows.

A CPU computes four tokens in the time of one, so the three guesses after the first right one take it no time."""


class PromptLookup:
    """Guesses that a sequence goes on as it did after an earlier occurrence of its last tokens.

    The source of the guesses is found as `generate` finds it: behind the earliest occurrence of the longest n-gram of
    the last tokens. While the guesses are right, the source is kept, and they are taken from the tokens that follow it.

    The next token is guessed at every step, and the guess is compared with the token that the model has chosen. Only
    after a right guess does a step compute guesses: in a text that does not repeat, nearly all would be wrong.
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
        """Start with a prompt; `num_tokens` is the most that are guessed at once."""
        self._ids: NDArray[np.int64] = np.empty(len(prompt_ids) + max_new_tokens, np.int64)
        self._length = len(prompt_ids)
        self._ids[: self._length] = prompt_ids
        self._num_tokens = num_tokens
        self._max_ngram_size = max_ngram_size
        self._eos_token_ids = eos_token_ids
        self._num_right = 0
        """Guesses in a row that were right, up to the latest token."""
        self._source = find_source(self._ids[: self._length], max_ngram_size)
        """The index of the token that is guessed to come next."""

    @property
    def is_confident(self) -> bool:
        """The last guess was right, so that the next ones are worth a step's time."""
        return self._num_right > 0

    def append(self, token_id: int) -> None:
        """Take the token that the model has chosen."""
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
        """Return up to `limit` tokens that may come next, none while there is no confidence.

        A source that reaches the end of the text goes on with the guesses themselves, so that a loop is followed
        however short it is. An end-of-sequence token ends the guesses: no token follows it.
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
    """Return the prompt lookup that a request asks for, or None."""
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
    """Return the index behind the earliest occurrence of the longest n-gram that ends the text, or None.

    An n-gram has up to `max_ngram_size` tokens. Its occurrence at the end of the text itself does not count.
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
