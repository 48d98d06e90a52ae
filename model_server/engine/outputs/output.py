"""Output: turns tokens into text events and ends choices. The batch and the fallback both use it."""

from __future__ import annotations

import time
from collections.abc import Container

from model_server.engine.unbatched.batchable import can_batch
from model_server.errors import ServeError
from model_server.request import Finished, FinishReason, Request, TextDelta, Token
from model_server.telemetry import request_log


def finish_reason(
    token_id: int, num_tokens: int, eos_token_ids: Container[int], max_new_tokens: int
) -> FinishReason | None:
    """Return why a choice ends with this token, its `num_tokens`-th, or None. `OutputWriter` handles stop strings."""
    if token_id in eos_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if num_tokens >= max_new_tokens else None


class OutputWriter:
    """Detokenizes one choice and sends its events; `Finished` is the last event and is sent once."""

    def __init__(self, request: Request, index: int = 0) -> None:
        self.num_tokens = 0
        self._request = request
        self._index = index
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether the choice has ended or its request has failed."""
        return self._finished or self._request.channel.finished

    def write(self, token_id: int, reason: FinishReason | None = None, tokens: tuple[Token, ...] = ()) -> None:
        """Send the text that a token adds; send `Finished` if there is a reason or the text contains a stop string.

        Args:
            tokens: the token with its log-probability, if the request asks for it.
        """
        if self.finished:
            return
        self.num_tokens += 1
        _record_token(self._request)
        detokenizer = self._request.detokenizers[self._index]
        text = detokenizer.push(token_id)
        if text or tokens:
            self._request.channel.send(TextDelta(text, self._index, tokens))
        if detokenizer.stopped:
            reason = FinishReason.STOP
        if reason is not None:
            self.finish(reason)

    def finish(self, reason: FinishReason) -> None:
        """Send the rest of the text and `Finished`; do nothing if the choice has ended."""
        if self.finished:
            return
        self._finished = True
        request = self._request
        detokenizer = request.detokenizers[self._index]
        text = detokenizer.flush()
        if text:
            request.channel.send(TextDelta(text, self._index))
        if detokenizer.stopped:  # the rest of the text can complete a stop string
            reason = FinishReason.STOP
        # Read before `Finished` is sent: a reader also sets `cancelled` after it has received all events.
        outcome = "cancelled" if request.cancelled else reason.value
        request.channel.send(Finished(reason, request.num_prompt_tokens, self.num_tokens, self._index))
        if request.channel.finished:
            request_log.finished(request, outcome, batched=can_batch(request.sampling))


def finish_with_error(request: Request, error: ServeError) -> None:
    """End all choices of a request with an error; do nothing if they have ended. The caller wakes the reader."""
    if not request.channel.finished:
        outcome = "cancelled" if request.cancelled else error.code
        request.channel.send(error)
        request_log.finished(request, outcome, batched=can_batch(request.sampling))


def _record_token(request: Request) -> None:
    now_s = time.monotonic()
    if request.first_token_s is None:
        request.first_token_s = now_s
        request_log.first_token(
            now_s - request.arrived_s,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached_tokens,
        )
    else:
        request_log.next_token(now_s - request.last_token_s)
    request.last_token_s = now_s
    request.num_output_tokens += 1
