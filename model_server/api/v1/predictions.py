"""KServe's V1 predict on the wire, outbound: a call's events in, JSON, an event stream or bare text out.

`answer` gathers the whole answer; `sse` and `plain_text` wait for the first event, so that a failure before it is
still an HTTP error, and return the rest as an iterator. Leaving any of them early cancels the requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from model_server.api.http.streaming import DONE, after_first, frame
from model_server.api.prompts import Call
from model_server.api.v1.predict import PredictCall
from model_server.request import Event, Finished, Request, TextDelta


class Prediction(BaseModel):
    """One answer."""

    model_config = ConfigDict(extra="forbid")
    generated_text: str
    finish_reason: Literal["stop", "length"]
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
    texts = [[prompt] for _ in request.detokenizers]
    predictions: list[dict[str, Any]] = [{} for _ in texts]
    async for event in request.answer():
        if isinstance(event, TextDelta):
            texts[event.index].append(event.text)
        elif isinstance(event, Finished):
            predictions[event.index] = {"generated_text": "".join(texts[event.index])} | _counts(event)
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
        ServeError: the request failed before its first event. A later failure is raised by the iterator: bare
            text has no place for it, so the connection must be cut for the client to see it.
    """
    return text_pieces(call, await after_first(call.requests[0].answer()), call.prompts[0])


async def _sse_frames(call: PredictCall, events: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
    try:
        if call.prompts[0]:
            yield frame({"text": call.prompts[0]})
        async for event in events:
            if isinstance(event, Finished):
                yield frame({"text": ""} | _counts(event))
                yield DONE
            elif isinstance(event, TextDelta) and event.text:
                yield frame({"text": event.text})
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


def _counts(final: Finished) -> dict[str, Any]:
    return {
        "finish_reason": final.finish_reason,
        "prompt_tokens": final.prompt_tokens,
        "completion_tokens": final.completion_tokens,
    }
