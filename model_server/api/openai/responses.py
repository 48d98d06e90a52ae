"""OpenAI's API on the wire, outbound: an `OpenAICall`'s events in, JSON or an event stream out.

`answer` gathers everything; `sse` waits for the first event, so that a failure before it is still an HTTP error.
Leaving either early cancels the call. Knows nothing of HTTP, KServe or torch.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from model_server.api.http.streaming import DONE, after_first, frame
from model_server.api.openai.requests import OpenAICall
from model_server.request import Event, Finished, PromptLogprobs, Request, Token

LEAST_LOGPROB = -9999.0
"""OpenAI's value for a log-probability of minus infinity, which JSON cannot write."""

Json = dict[str, Any]


async def answer(call: OpenAICall) -> Json:
    """Return the whole answer.

    Raises:
        ServeError: a choice failed; the others are cancelled.
    """
    choices = [_Choice(call, index) for index in range(len(call.requests))]
    try:
        async with contextlib.aclosing(_merged(call.requests)) as events:
            async for index, event in events:
                choices[index].add(event)
    finally:
        call.cancel()
    return _envelope(call) | {
        "choices": [choice.whole() for choice in choices],
        "usage": _usage(call, choices),
    }


async def sse(call: OpenAICall) -> AsyncGenerator[bytes, None]:
    """Wait for the first event, then return the server-sent events.

    Raises:
        ServeError: the call failed before its first event; nothing has been sent. A later failure is raised by the
            iterator; the middleware makes it the stream's last event.
    """
    return _frames(call, await after_first(_merged(call.requests)))


async def _frames(call: OpenAICall, events: AsyncGenerator[tuple[int, Event], None]) -> AsyncGenerator[bytes, None]:
    choices = [_Choice(call, index) for index in range(len(call.requests))]
    envelope = _envelope(call)
    if call.include_usage:
        envelope["usage"] = None
    try:
        if call.chat:
            for choice in choices:
                yield frame(envelope | {"choices": [choice.opening()]})
        async for index, event in events:
            if piece := choices[index].add(event):
                yield frame(envelope | {"choices": [choices[index].written(piece)]})
        if call.include_usage:
            yield frame(envelope | {"choices": [], "usage": _usage(call, choices)})
        yield DONE
    finally:
        await events.aclose()
        call.cancel()


async def _merged(requests: tuple[Request, ...]) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield (choice, event) of all requests as they come; the first failure ends all."""
    ready: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

    async def pump(index: int, request: Request) -> None:
        try:
            async for event in request.answer():
                ready.put_nowait((index, event))
        except Exception as error:  # whatever it is, the reader must not wait for more
            ready.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
    open_choices = len(requests)
    try:
        while open_choices:
            index, event = await ready.get()
            if isinstance(event, Exception):
                raise event
            open_choices -= isinstance(event, Finished)
            yield index, event
    finally:
        for task in tasks:
            task.cancel()
        for request in requests:
            request.cancel()


@dataclass(frozen=True)
class _Piece:
    """The text and log-probabilities that one event adds to a choice."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None


class _Choice:
    """One choice as it grows. It is written either piece by piece or whole, not both: offsets count on."""

    def __init__(self, call: OpenAICall, index: int) -> None:
        self._call = call
        self._index = index
        self._unsent = call.echoes[index]
        self._pieces: list[_Piece] = []
        self._offsets = call.text.stream()
        self._offset = 0
        self.completion_tokens = 0

    def add(self, event: Event) -> _Piece | None:
        """Take an event in; return what it adds, if anything."""
        text, reason = self._unsent, None
        tokens: tuple[Token, ...] = ()
        if isinstance(event, Finished):
            reason = "length" if self._call.only_echo else event.finish_reason.value
            self.completion_tokens = 0 if self._call.only_echo else event.completion_tokens
        elif isinstance(event, PromptLogprobs):
            tokens = event.tokens
        elif not self._call.only_echo:
            text, tokens = text + event.text, event.tokens
        if not (text or tokens or reason):
            return None
        self._unsent = ""
        self._pieces.append(_Piece(text, tokens, reason))
        return self._pieces[-1]

    def opening(self) -> Json:
        """Return the chunk that begins a chat's choice."""
        delta = {"role": "assistant", "content": ""}
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

    def written(self, piece: _Piece) -> Json:
        """Return a piece as a stream has it."""
        shared = self._shared(piece.tokens, piece.finish_reason)
        if not self._call.chat:
            return shared | {"text": piece.text}
        return shared | {"delta": {"content": piece.text} if piece.text or piece.tokens else {}}

    def whole(self) -> Json:
        """Return the choice as an answer that is not streamed has it."""
        text = "".join(piece.text for piece in self._pieces)
        tokens = [token for piece in self._pieces for token in piece.tokens]
        shared = self._shared(tokens, self._pieces[-1].finish_reason)
        if not self._call.chat:
            return shared | {"text": text}
        return shared | {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _shared(self, tokens: Sequence[Token], finish_reason: str | None) -> Json:
        logprobs = None
        if self._call.logprobs:
            logprobs = self._of_chat(tokens) if self._call.chat else self._of_completion(tokens)
        return {"index": self._index, "logprobs": logprobs, "finish_reason": finish_reason}

    def _of_chat(self, tokens: Sequence[Token]) -> Json:
        def entry(token_id: int, logprob: float | None) -> Json:
            raw = self._call.text.token_bytes(token_id)
            return {"token": self._call.text.token_text(token_id), "logprob": _finite(logprob), "bytes": list(raw)}

        content = [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*likely) for likely in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _of_completion(self, tokens: Sequence[Token]) -> Json:
        names = self._call.text.token_text
        written: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            written["tokens"].append(names(token.id))
            written["token_logprobs"].append(_finite(token.logprob))
            written["top_logprobs"].append(self._top(token))
            written["text_offset"].append(self._offset)
            self._offset += len(self._offsets.push(token.id))
        return written

    def _top(self, token: Token) -> Json | None:
        """Return the likeliest tokens and the token itself; of two that read the same, the likelier."""
        if token.logprob is None:
            return None
        top: Json = {}
        for token_id, logprob in (*token.top, (token.id, token.logprob)):
            top.setdefault(self._call.text.token_text(token_id), _finite(logprob))
        return top


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def _envelope(call: OpenAICall) -> Json:
    """Return the first fields of every chunk of a call, or of its whole answer."""
    kind = "text_completion"
    if call.chat:
        kind = "chat.completion.chunk" if call.stream else "chat.completion"
    prefix = "chatcmpl" if call.chat else "cmpl"
    return {"id": f"{prefix}-{call.id}", "object": kind, "created": call.created_s, "model": call.model}


def _usage(call: OpenAICall, choices: list[_Choice]) -> Json:
    completion_tokens = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": call.num_prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": call.num_prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(request.num_cached_tokens for request in call.requests[:: call.n])
        },
    }
