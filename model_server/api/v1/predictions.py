"""KServe's V1 predict on the wire, outbound: a call's events in, JSON, an event stream or bare text out.

`answer` gathers the whole answer; `sse` and `plain_text` wait for the first event, so that a failure before it is
still an HTTP error, and return the rest as an iterator. Leaving any of them early cancels the requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from model_server.api.http.streaming import DONE, after_first, frame
from model_server.api.prompts import Call
from model_server.api.tools import answers
from model_server.api.v1.predict import PredictCall
from model_server.errors import BadRequest
from model_server.request import Event, Finished, FinishReason, Request, TextDelta
from model_server.text.tool_calls import Delta, ToolCallParser


class WrittenFunction(BaseModel):
    """A function to call, and its arguments as JSON."""

    model_config = ConfigDict(extra="forbid")
    name: str
    arguments: str


class WrittenToolCall(BaseModel):
    """A tool call that the model asks for."""

    model_config = ConfigDict(extra="forbid")
    id: str
    type: Literal["function"]
    function: WrittenFunction


class Prediction(BaseModel):
    """One answer."""

    model_config = ConfigDict(extra="forbid")
    generated_text: str
    tool_calls: list[WrittenToolCall] | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]
    prompt_tokens: int = Field(ge=1)
    completion_tokens: int = Field(ge=0)


class Predictions(BaseModel):
    """The answers of a call, in the order of the instances."""

    model_config = ConfigDict(extra="forbid")
    predictions: list[Prediction]


async def answer(call: PredictCall) -> dict[str, list[dict[str, Any]]]:
    """Return the whole answer, a prediction for each sequence.

    Raises:
        ServeError: a request failed; the others of the call are cancelled.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            gathered = [
                tasks.create_task(_predictions(request, prompt))
                for request, prompt in zip(call.requests, call.prompts, strict=True)
            ]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    finally:
        call.cancel()
    return {"predictions": [prediction for task in gathered for prediction in task.result()]}


async def _predictions(request: Request, prompt: str) -> list[dict[str, Any]]:
    texts = [ToolCallParser() for _ in request.detokenizers]
    predictions: list[dict[str, Any]] = [{} for _ in texts]
    async for event in request.answer():
        if isinstance(event, TextDelta):
            texts[event.index].push(event.text)
        elif isinstance(event, Finished):
            text = texts[event.index]
            text.finish()
            predictions[event.index] = {"generated_text": prompt + text.content} | _end(event, text)
    return predictions


async def sse(call: PredictCall) -> AsyncGenerator[bytes, None]:
    """Wait for the first event, then return the server-sent events of a streamed call.

    Raises:
        ServeError: the request failed before its first event; nothing has been sent. A later failure is raised by
            the iterator; the middleware makes it the stream's last event.
    """
    return _sse_frames(call, await after_first(call.requests[0].answer()))


async def plain_text(call: PredictCall) -> AsyncGenerator[bytes, None]:
    """Wait for the first event, then return the plain text in chunks.

    Raises:
        ServeError: the request failed before its first event, or its answer may have tool calls. A later failure is
            raised by the iterator: bare text has no place for it, so the connection must be cut for the client to see
            it.
    """
    if call.calls_tools:
        call.cancel()
        raise BadRequest("tools need JSON or events: plain text cannot carry a tool call.", field="tools")
    return text_pieces(call, await after_first(call.requests[0].answer()), call.prompts[0])


async def _sse_frames(call: PredictCall, events: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
    try:
        if call.prompts[0]:
            yield frame({"text": call.prompts[0]})
        answer = ToolCallParser()
        async for event in events:
            if isinstance(event, Finished):
                for text in _texts(answer.finish()):
                    yield frame({"text": text})
                yield frame({"text": ""} | _end(event, answer))
                yield DONE
            elif isinstance(event, TextDelta):
                for text in _texts(answer.push(event.text)):
                    yield frame({"text": text})
    finally:
        call.cancel()


async def text_pieces(call: Call, events: AsyncIterator[Event], before: str) -> AsyncGenerator[bytes, None]:
    """Yield plain text: the prompt if it was asked for, then the completion in chunks; then cancel the call."""
    try:
        if before:
            yield before.encode()
        async for event in events:
            if isinstance(event, TextDelta) and event.text:
                yield event.text.encode()
    finally:
        call.cancel()


def _texts(deltas: Sequence[Delta]) -> Iterator[str]:
    """Yield what is content; the tool calls come whole in the last event."""
    return (delta for delta in deltas if isinstance(delta, str))


def _end(final: Finished, answer: ToolCallParser) -> dict[str, Any]:
    calls = {"tool_calls": [answers.written(call) for call in answer.calls]} if answer.calls else {}
    cut = final.finish_reason is FinishReason.LENGTH
    return calls | {
        "finish_reason": answers.FINISH_REASON if calls and not cut else final.finish_reason,
        "prompt_tokens": final.prompt_tokens,
        "completion_tokens": final.completion_tokens,
    }
