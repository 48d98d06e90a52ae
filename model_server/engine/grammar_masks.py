"""Starts the masks of sequences with a grammar, and leaves sequences with a late mask out of steps.

A mask is started as soon as its sequence has accepted a token, and is filled beside the rest of the step and the next
forward. A sequence whose mask is late gets no token in the step: a later step, planned when the mask is there, computes
its logits again. So its tokens are those that it would get without a time limit.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable
from collections.abc import Sequence as Sized

from model_server.compute.token_mask import TokenMask, TokenMaskFiller, known_mask
from model_server.engine.sequence import Sequence
from model_server.engine.step import Batch

LIMIT_S = 0.005
"""Time that a step waits for masks after its forward, besides `LIMIT_PER_MASK_S` for each missing one."""
LIMIT_PER_MASK_S = 0.0005
"""An ordinary mask takes a tenth of this, and starts before the forward: it is not late on a busy machine either."""
SLOW_MASK_S = 0.002
"""CPU time of a mask that is filled apart from the others: an ordinary one takes at most 0.5 ms, a hostile one 38."""
IDLE_WAIT_S = 0.002
"""How long a step waits if every sequence of the batch waits for its mask; new requests are seen after it."""


class GrammarMasks:
    """The masks of the batch's sequences."""

    def __init__(self, filler: TokenMaskFiller) -> None:
        self._filler = filler

    def start(self, sequences: Iterable[Sequence]) -> None:
        """Start the masks for the next tokens of these sequences, where there is a grammar and no mask yet."""
        together: list[Sequence] = []
        for sequence in sequences:
            matcher = sequence.request.matcher
            if matcher is None or not matcher.active or sequence.mask is not None or sequence.finished:
                continue
            if matcher.first_mask is not None:
                sequence.mask = known_mask(matcher.first_mask)
            elif sequence.mask_is_slow:
                sequence.mask = self._filler.start_apart(matcher)
            else:
                together.append(sequence)
        if together:
            matchers = [sequence.request.matcher for sequence in together]
            for sequence, mask in zip(together, self._filler.start([m for m in matchers if m]), strict=True):
                sequence.mask = mask

    def late(self, batch: Batch) -> set[Sequence]:
        """Wait for the masks of a step, not longer than the limit; return the sequences that sit out.

        Their masks are filled apart from now on, until one is quick: which of them was slow is not known. A sequence
        whose prompt is completed never sits out: the mask of a first token is known from the compilation.
        """
        pending = {s: s.mask.filled for s in batch.sampled if s.mask is not None and not s.mask.done}
        if not pending:
            return set()
        concurrent.futures.wait({filled for s, filled in pending.items() if not s.decoding})
        concurrent.futures.wait(set(pending.values()), timeout=LIMIT_S + LIMIT_PER_MASK_S * len(pending))
        late = {s for s, filled in pending.items() if not filled.done()}
        for sequence in late:
            sequence.mask_is_slow = True
        return late

    def of(self, sequences: Sized[Sequence]) -> TokenMask | None:
        """Return the masks of a step's sampled sequences; None if all of them may take every token."""
        masks = {i: s.mask for i, s in enumerate(sequences) if s.mask is not None}
        joined = self._filler.join(masks)
        for i, mask in masks.items():
            if sequences[i].mask_is_slow:
                sequences[i].mask_is_slow = mask.filled.result().cpu_s > SLOW_MASK_S
        return joined

    @staticmethod
    def wait(sequences: Iterable[Sequence]) -> None:
        """Wait a moment until one of these sequences has its mask."""
        pending = {s.mask.filled for s in sequences if s.mask is not None}
        concurrent.futures.wait(pending, timeout=IDLE_WAIT_S, return_when=concurrent.futures.FIRST_COMPLETED)
