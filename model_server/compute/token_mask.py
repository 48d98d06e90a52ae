"""Token masks: the tokens that grammars allow in a step.

Worker threads fill the masks while the batch thread computes the forward. This module leaves out grammars
(`text/grammar.py`), the wait for late masks (`engine/grammar_masks.py`) and sampling (`sampling.py`).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model_server.compute.gpu.host_device import to_device
from model_server.errors import InternalError, ServeError
from model_server.request import TokenMatcher

logger = logging.getLogger(__name__)


_BIAS_OF_BYTE = torch.tensor(
    [[0.0 if byte >> bit & 1 else -torch.inf for bit in range(8)] for byte in range(256)], dtype=torch.float32
)
"""Maps a byte of a mask to the biases of its eight tokens' logits. A boolean mask takes a CPU ten times as long."""


@functools.cache
def _bias_of_byte(device: torch.device) -> Tensor:
    return _BIAS_OF_BYTE.to(device)


@dataclass(frozen=True, slots=True)
class TokenMask:
    """The allowed tokens of the sequences with a grammar in a step."""

    indices: Sequence[int]
    """The sequences with a grammar, as indices into the step's sampled sequences."""
    bits: Tensor
    """(len(indices), bytes) on the host, one bit per token; pinned if the model is on a GPU."""
    errors: Mapping[int, ServeError] = field(default_factory=dict)
    """The errors of masks that could not be computed, by the same index; these masks allow every token."""

    def apply(self, logits: Tensor) -> Tensor:
        """Return the logits (sequences, vocab_size) with -inf for every forbidden token; do not wait for the device."""
        device = logits.device
        bits = self.bits.to(device, non_blocking=True).int()
        bias = torch.nn.functional.embedding(bits, _bias_of_byte(device)).flatten(1)[:, : logits.shape[-1]]
        if len(self.indices) == len(logits):
            return bias.add_(logits)  # reuses the memory of the bias: allocating takes as long as adding
        return logits.index_add(0, to_device(self.indices, device, torch.long), bias)


def allow_all(num_sequences: int, vocab_size: int, device: torch.device) -> TokenMask:
    """Return a mask that allows every token, for all sequences of a step."""
    words = _words(num_sequences, _num_words(vocab_size), pin=device.type == "cuda").fill_(-1)
    return TokenMask(range(num_sequences), words.view(torch.uint8))


def only_allowed(scores: Tensor, masked_logits: Tensor) -> Tensor:
    """Return the scores with the mask applied again after the logits processors.

    A processor may give a forbidden token a finite score: the token stays forbidden. A processor may also forbid all
    allowed tokens: the masked logits then replace the scores. The function does not wait for the device.
    """
    scores = scores.masked_fill((masked_logits == -torch.inf) | scores.isnan(), -torch.inf)
    has_token = (scores > -torch.inf).any(-1, keepdim=True)
    return torch.where(has_token, scores, masked_logits)


@dataclass(frozen=True, slots=True)
class FilledMasks:
    """The result of one call that fills masks."""

    errors: Mapping[int, ServeError]
    """The errors of masks that could not be computed, by position in the call; these masks allow every token."""
    cpu_s: float
    """The CPU time of the thread that made the call."""


@dataclass(frozen=True, eq=False, slots=True)
class PendingMask:
    """The mask for the next token of one sequence, which may not be filled yet."""

    words: Tensor
    """A row of 32-bit words on the host."""
    filled: Future[FilledMasks]
    """The call that fills the mask, and possibly others."""
    position: int = 0
    """The position of the mask in the call."""

    @property
    def done(self) -> bool:
        return self.filled.done()


class TokenMaskFiller:
    """Fills masks in worker threads during the forward."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._num_words = _num_words(vocab_size)
        self._pin = device.type == "cuda"
        self._together = ThreadPoolExecutor(1, thread_name_prefix="token-mask")
        self._apart = ThreadPoolExecutor(1, thread_name_prefix="slow-token-mask")

    def start(self, matchers: Sequence[TokenMatcher]) -> list[PendingMask]:
        """Start to fill the masks of several matchers in one call. The matchers must not be used until it is done."""
        return self._start(matchers, self._together)

    def start_apart(self, matcher: TokenMatcher) -> PendingMask:
        """Start to fill one mask in a separate thread, so that the masks of `start` do not wait for it."""
        return self._start([matcher], self._apart)[0]

    def join(self, masks: Mapping[int, PendingMask]) -> TokenMask | None:
        """Wait for the masks of a step, by index into its sampled sequences, and return them as one mask."""
        if not masks:
            return None
        calls = {i: mask.filled.result() for i, mask in masks.items()}
        words = _words(len(masks), self._num_words, pin=self._pin)
        torch.stack([mask.words for mask in masks.values()], out=words)
        errors = {i: call.errors[masks[i].position] for i, call in calls.items() if masks[i].position in call.errors}
        return TokenMask([*masks], words.view(torch.uint8), errors)

    def _start(self, matchers: Sequence[TokenMatcher], worker: ThreadPoolExecutor) -> list[PendingMask]:
        words = _words(len(matchers), self._num_words)
        filled = worker.submit(_fill, matchers, words)
        return [PendingMask(row, filled, i) for i, row in enumerate(words)]


def known_mask(words: bytes) -> PendingMask:
    """Return a mask with these words, already filled."""
    filled: Future[FilledMasks] = Future()
    filled.set_result(FilledMasks({}, cpu_s=0))
    return PendingMask(torch.frombuffer(bytearray(words), dtype=torch.int32), filled)


def _fill(matchers: Sequence[TokenMatcher], words: Tensor) -> FilledMasks:
    began_s = time.thread_time()
    errors = _fill_all(matchers, words)
    words[[*errors]] = -1
    return FilledMasks(errors, time.thread_time() - began_s)


def _fill_all(matchers: Sequence[TokenMatcher], words: Tensor) -> Mapping[int, ServeError]:
    """Fill the masks of all matchers in one call; if it fails, fill each mask separately. Return the errors."""
    try:
        return type(matchers[0]).fill_all(matchers, words.data_ptr(), words.nbytes)
    except Exception:
        if len(matchers) == 1:
            logger.exception("the mask of a sequence could not be computed")
            return {0: InternalError()}
    alone = [_fill_all([matcher], words[i : i + 1]) for i, matcher in enumerate(matchers)]
    return {i: failure[0] for i, failure in enumerate(alone) if failure}


def _num_words(vocab_size: int) -> int:
    return (vocab_size + 31) // 32


def _words(num_sequences: int, num_words: int, *, pin: bool = False) -> Tensor:
    return torch.empty((num_sequences, num_words), dtype=torch.int32, pin_memory=pin)
