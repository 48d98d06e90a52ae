"""Which tokens the sequences with a grammar may take in a step.

A worker thread fills the masks while the batch's thread computes the forward. Leaves out how a grammar is compiled and
matched (`text/grammar.py`) and how a token is chosen (`sampling.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model_server.compute.gpu.host_device import to_device
from model_server.errors import InternalError, ServeError
from model_server.request import TokenMatcher

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenMask:
    """The allowed tokens of the constrained sequences of a step."""

    indices: Sequence[int]
    """The constrained sequences, as indices into the step's sampled ones."""
    allowed: Tensor
    """(len(indices), vocab_size) booleans on the host, pinned if the model is on a GPU."""
    errors: Mapping[int, ServeError] = field(default_factory=dict)
    """The sequences whose mask could not be computed, by the same index; every token of theirs is allowed."""

    def apply(self, logits: Tensor) -> Tensor:
        """Return (sequences, vocab_size) logits with -inf for every token that is not allowed, without a wait."""
        allowed = self.allowed.to(logits.device, non_blocking=True)
        if len(self.indices) == len(logits):
            return logits.masked_fill(~allowed, -torch.inf)
        which = to_device(self.indices, logits.device, torch.long)
        masked = logits.clone()
        masked[which] = logits[which].masked_fill(~allowed, -torch.inf)
        return masked


def only_allowed(scores: Tensor, masked_logits: Tensor) -> Tensor:
    """Return scores that keep to a mask whatever logits processors made of the masked logits.

    A processor may have given a forbidden token a finite score, or forbidden all that were left. The grammar wins: in
    the second case the masked logits count. Decided on the device.
    """
    scores = scores.masked_fill((masked_logits == -torch.inf) | scores.isnan(), -torch.inf)
    has_token = (scores > -torch.inf).any(-1, keepdim=True)
    return torch.where(has_token, scores, masked_logits)


class TokenMaskFiller:
    """Fills the masks of a step in a thread beside the forward."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._pin = device.type == "cuda"
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="token-mask")

    def start(self, matchers: Sequence[TokenMatcher | None]) -> Future[TokenMask] | None:
        """Start to fill the masks of a step's sequences; return None if all of them may take every token.

        The matchers must not be used until the result is there.
        """
        constrained = {i: m for i, m in enumerate(matchers) if m is not None and m.active}
        return self._worker.submit(self._fill, constrained) if constrained else None

    def _fill(self, matchers: Mapping[int, TokenMatcher]) -> TokenMask:
        words = np.empty((len(matchers), (self._vocab_size + 31) // 32), dtype=np.uint32)
        errors: dict[int, ServeError] = {}
        for of_sequence, (i, matcher) in zip(words, matchers.items(), strict=True):
            try:
                matcher.fill(of_sequence.ctypes.data, of_sequence.nbytes)
            except ServeError as error:
                errors[i] = error
            except Exception:
                logger.exception("the mask of a sequence could not be computed")
                errors[i] = InternalError()
            if i in errors:
                of_sequence.fill(0xFFFFFFFF)
        bits = np.unpackbits(words.view(np.uint8), axis=1, count=self._vocab_size, bitorder="little")
        allowed = torch.from_numpy(bits).view(torch.bool)
        return TokenMask(list(matchers), allowed.pin_memory() if self._pin else allowed, errors)
