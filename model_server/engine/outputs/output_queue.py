"""Queues sampled tokens until their output is written, so that detokenization can overlap the next step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from model_server.engine.outputs.output import finish_with_error
from model_server.engine.sequence import Sequence
from model_server.errors import InternalError
from model_server.request import FinishReason, Request, Token

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PendingToken:
    """A token that its sequence has accepted and that is not yet sent to the reader."""

    sequence: Sequence
    token_id: int
    reason: FinishReason | None
    """Why the sequence ends with this token; None if it continues."""
    tokens: tuple[Token, ...]
    """The token with its log-probability, if the request asks for it."""


class OutputQueue:
    """The pending tokens of the batch, in order."""

    def __init__(self, wake: Callable[[Iterable[Request]], None]) -> None:
        """Make an empty queue; `wake` wakes the readers of requests."""
        self._wake = wake
        self._pending: list[PendingToken] = []

    @property
    def requests(self) -> list[Request]:
        """The requests with pending tokens; callable from any thread."""
        return [pending.sequence.request for pending in [*self._pending]]

    def append(self, pending: PendingToken) -> None:
        self._pending.append(pending)

    def flush(self) -> list[Sequence]:
        """Write all pending tokens, wake the readers once, and return the sequences that have ended.

        If the detokenizer fails for a sequence, only that sequence ends with an error.
        """
        written: list[Request] = []
        ended: list[Sequence] = []
        while self._pending:
            pending = self._pending[0]
            sequence, request = pending.sequence, pending.sequence.request
            try:
                sequence.writer.write(pending.token_id, pending.reason, pending.tokens)
            except Exception:
                logger.exception("request %s failed in its detokenizer", request.request_id)
                finish_with_error(request, InternalError())
            written.append(request)
            if request.channel.finished:
                ended.append(sequence)
            self._pending.pop(0)  # only now: the request counts as running until its last event is sent
        self._wake(written)
        return ended
