"""Which tokens the sequences with a grammar may take in a step.

Worker threads fill the masks while the batch's thread computes the forward. Leaves out how a grammar is compiled and
matched (`text/grammar.py`), which sequences wait for their mask (`engine/grammar_masks.py`) and how a token is chosen
(`sampling.py`).
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
"""What the eight tokens of a byte of a mask add to their logits. A boolean mask costs a CPU ten times as much."""


@functools.cache
def _bias_of_byte(device: torch.device) -> Tensor:
    return _BIAS_OF_BYTE.to(device)


@dataclass(frozen=True, slots=True)
class TokenMask:
    """The allowed tokens of the constrained sequences of a step."""

    indices: Sequence[int]
    """The constrained sequences, as indices into the step's sampled ones."""
    bits: Tensor
    """(len(indices), bytes) on the host, a bit for each token, pinned if the model is on a GPU."""
    errors: Mapping[int, ServeError] = field(default_factory=dict)
    """The sequences whose mask could not be computed, by the same index; every token of theirs is allowed."""

    def apply(self, logits: Tensor) -> Tensor:
        """Return (sequences, vocab_size) logits with -inf for every token that is not allowed, without a wait."""
        device = logits.device
        bits = self.bits.to(device, non_blocking=True).int()
        bias = torch.nn.functional.embedding(bits, _bias_of_byte(device)).flatten(1)[:, : logits.shape[-1]]
        if len(self.indices) == len(logits):
            return bias.add_(logits)  # the memory of the bias is used again: new memory costs as much as the sum
        return logits.index_add(0, to_device(self.indices, device, torch.long), bias)


def allow_all(num_sequences: int, vocab_size: int, device: torch.device) -> TokenMask:
    """Return a mask that changes nothing, for all sequences of a step."""
    words = _words(num_sequences, _num_words(vocab_size), pin=device.type == "cuda").fill_(-1)
    return TokenMask(range(num_sequences), words.view(torch.uint8))


def only_allowed(scores: Tensor, masked_logits: Tensor) -> Tensor:
    """Return scores that keep to a mask whatever logits processors made of the masked logits.

    A processor may have given a forbidden token a finite score, or forbidden all that were left. The grammar wins: in
    the second case the masked logits count. Decided on the device.
    """
    scores = scores.masked_fill((masked_logits == -torch.inf) | scores.isnan(), -torch.inf)
    has_token = (scores > -torch.inf).any(-1, keepdim=True)
    return torch.where(has_token, scores, masked_logits)


@dataclass(frozen=True, slots=True)
class FilledMasks:
    """The end of one call that fills masks."""

    errors: Mapping[int, ServeError]
    """The masks that could not be computed, by position in the call; every token is allowed there."""
    cpu_s: float
    """What the call took the thread that made it."""


@dataclass(frozen=True, eq=False, slots=True)
class PendingMask:
    """The mask of one sequence for its next token; it may not be filled yet."""

    words: Tensor
    """A row of 32-bit words on the host."""
    filled: Future[FilledMasks]
    """The call that fills it, perhaps together with others."""
    position: int = 0
    """Its position in the call."""

    @property
    def done(self) -> bool:
        return self.filled.done()


class TokenMaskFiller:
    """Fills masks in threads beside the forward."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._num_words = _num_words(vocab_size)
        self._pin = device.type == "cuda"
        self._together = ThreadPoolExecutor(1, thread_name_prefix="token-mask")
        self._apart = ThreadPoolExecutor(1, thread_name_prefix="slow-token-mask")

    def start(self, matchers: Sequence[TokenMatcher]) -> list[PendingMask]:
        """Start to fill the masks of several matchers in one call. They must not be used until it is done."""
        return self._start(matchers, self._together)

    def start_apart(self, matcher: TokenMatcher) -> PendingMask:
        """Start to fill one mask in a call of its own, so that those of `start` do not wait for it."""
        return self._start([matcher], self._apart)[0]

    def join(self, masks: Mapping[int, PendingMask]) -> TokenMask | None:
        """Wait for the masks of a step, by index into its sampled sequences, and return them together."""
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
    """Return a mask that is filled already."""
    filled: Future[FilledMasks] = Future()
    filled.set_result(FilledMasks({}, cpu_s=0))
    return PendingMask(torch.frombuffer(bytearray(words), dtype=torch.int32), filled)


def _fill(matchers: Sequence[TokenMatcher], words: Tensor) -> FilledMasks:
    began_s = time.thread_time()
    errors = _fill_all(matchers, words)
    words[[*errors]] = -1
    return FilledMasks(errors, time.thread_time() - began_s)


def _fill_all(matchers: Sequence[TokenMatcher], words: Tensor) -> Mapping[int, ServeError]:
    """Fill the masks of all matchers in one call, or of each alone where that fails; return the failures."""
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
