"""One choice of an answer as it grows: its text, tool calls and log-probabilities, in OpenAI's form.

The envelope around the choices, and when they are sent, is in `responses.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from model_server.api.openai.requests import OpenAICall
from model_server.api.tools import answers
from model_server.request import Event, Finished, PromptLogprobs, Token
from model_server.text.tool_calls import Delta, ToolCallParser

LEAST_LOGPROB = -9999.0
"""OpenAI's value for a log-probability of minus infinity, which JSON cannot write."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """The changes of a choice by one event."""

    deltas: tuple[Delta, ...]
    tokens: tuple[Token, ...]
    finish_reason: str | None


class Choice:
    """One choice as it grows. It is written either piece by piece or whole, not both: offsets count on."""

    def __init__(self, call: OpenAICall, index: int) -> None:
        self._call = call
        self._index = index
        self._unsent = call.echoes[index]
        self._pieces: list[Piece] = []
        self._answer = ToolCallParser()
        self._offsets = call.text.stream()
        self._offset = 0
        self.completion_tokens = 0

    def add(self, event: Event) -> Piece | None:
        """Take an event in; return what it adds, if anything."""
        text, reason = self._unsent, None
        deltas: list[Delta] = []
        tokens: tuple[Token, ...] = ()
        if isinstance(event, Finished):
            reason = "length" if self._call.only_echo else event.finish_reason.value
            deltas += self._answer.push(text) + self._answer.finish()
            if reason == "stop" and self._answer.calls:
                reason = answers.FINISH_REASON
            self.completion_tokens = 0 if self._call.only_echo else event.completion_tokens
        elif isinstance(event, PromptLogprobs):
            tokens = event.tokens
        elif not self._call.only_echo:
            text, tokens = text + event.text, event.tokens
        if reason is None:
            deltas += self._answer.push(text)
        if not (deltas or tokens or reason):
            return None
        self._unsent = ""
        self._pieces.append(Piece(tuple(deltas), tokens, reason))
        return self._pieces[-1]

    def opening(self) -> Json:
        """Return the chunk that begins a chat's choice."""
        delta = {"role": "assistant", "content": ""}
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunks(self, piece: Piece) -> Iterator[Json]:
        """Yield a piece as the chunks of a stream have it: one for each delta, the last with the rest of the piece."""
        *before, last = piece.deltas or ("",)
        for delta in before:
            yield self._chunk(delta, self._shared((), None))
        yield self._chunk(last, self._shared(piece.tokens, piece.finish_reason), has_tokens=bool(piece.tokens))

    def _chunk(self, delta: Delta, shared: Json, *, has_tokens: bool = False) -> Json:
        if not self._call.chat:
            return shared | {"text": delta}
        if not isinstance(delta, str):
            return shared | {"delta": {"tool_calls": [answers.written_delta(delta)]}}
        return shared | {"delta": {"content": delta} if delta or has_tokens else {}}

    def whole(self) -> Json:
        """Return the choice as an answer that is not streamed has it."""
        tokens = [token for piece in self._pieces for token in piece.tokens]
        shared = self._shared(tokens, self._pieces[-1].finish_reason)
        content, calls = self._answer.content, self._answer.calls
        if not self._call.chat:
            return shared | {"text": content}
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": [answers.written(call) for call in calls]}
        return shared | {"message": message}

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
