"""Starts the token masks of sequences with a grammar, and leaves sequences with a late mask out of steps.

A mask starts as soon as its sequence has accepted a token. Threads fill it during the rest of the step and the next
forward. A sequence with a late mask gets no token in the step; after its mask is filled, a later step computes its
logits again. The time limit therefore delays tokens but never changes them.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable
from collections.abc import Sequence as Sized

from model_server.compute.token_mask import TokenMask, TokenMaskFiller, known_mask
from model_server.engine.sequence import Sequence
from model_server.engine.step import Batch

LIMIT_S = 0.005
"""How long a step waits for masks after its forward, plus `LIMIT_PER_MASK_S` for each missing mask."""
LIMIT_PER_MASK_S = 0.0005
"""An ordinary mask takes a tenth of this and starts before the forward, so it is in time even on a busy machine."""
SLOW_MASK_S = 0.002
"""A mask that takes more CPU time is filled separately. An ordinary mask takes at most 0.5 ms, a hostile one 38 ms."""
IDLE_WAIT_S = 0.002
"""How long a step waits if every sequence waits for its mask. The engine admits new requests after this wait."""


class GrammarMasks:
    """The masks of the batch's sequences."""

    def __init__(self, filler: TokenMaskFiller) -> None:
        self._filler = filler

    def start(self, sequences: Iterable[Sequence]) -> None:
        """Start the next mask of each of these sequences that has a grammar and no mask."""
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
        """Wait for the masks of a step up to the limit; return the sequences whose masks are late.

        Late masks are filled separately until one is quick, because it is unknown which of them was slow. A sequence
        that completes its prompt is never late: the grammar's compilation has computed the mask of the first token.
        """
        pending = {s: s.mask.filled for s in batch.sampled if s.decoding and s.mask is not None and not s.mask.done}
        if not pending:
            return set()
        concurrent.futures.wait(set(pending.values()), timeout=LIMIT_S + LIMIT_PER_MASK_S * len(pending))
        late = {s for s, filled in pending.items() if not filled.done()}
        for sequence in late:
            sequence.mask_is_slow = True
        return late

    def of(self, sequences: Sized[Sequence]) -> TokenMask | None:
        """Return the masks of a step's sampled sequences, or None if every sequence allows every token."""
        masks = {i: s.mask for i, s in enumerate(sequences) if s.mask is not None}
        joined = self._filler.join(masks)
        for i, mask in masks.items():
            if sequences[i].mask_is_slow:
                sequences[i].mask_is_slow = mask.filled.result().cpu_s > SLOW_MASK_S
        return joined

    @staticmethod
    def wait(sequences: Iterable[Sequence]) -> None:
        """Wait up to `IDLE_WAIT_S` until one of these sequences has its mask."""
        pending = {s.mask.filled for s in sequences if s.mask is not None}
        concurrent.futures.wait(pending, timeout=IDLE_WAIT_S, return_when=concurrent.futures.FIRST_COMPLETED)
