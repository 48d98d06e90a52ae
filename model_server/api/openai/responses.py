"""OpenAI's API on the wire, outbound: an `OpenAICall`'s events in, JSON or an event stream out.

`answer` gathers everything; `sse` waits for the first event, so that a failure before it is still an HTTP error.
Leaving either early cancels the call. How a choice is written is in `choice.py`.
Knows nothing of HTTP, KServe or torch.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from model_server.api.http.streaming import DONE, after_first, frame
from model_server.api.openai.choice import Choice, Json
from model_server.api.openai.requests import OpenAICall
from model_server.request import Event, Finished, Request


async def answer(call: OpenAICall) -> Json:
    """Return the whole answer.

    Raises:
        ServeError: a choice failed; the others are cancelled.
    """
    choices = [Choice(call, index) for index in range(len(call.requests))]
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
    choices = [Choice(call, index) for index in range(len(call.requests))]
    envelope = _envelope(call)
    if call.include_usage:
        envelope["usage"] = None
    try:
        if call.chat:
            for choice in choices:
                yield frame(envelope | {"choices": [choice.opening()]})
        async for index, event in events:
            if piece := choices[index].add(event):
                for chunk in choices[index].chunks(piece):
                    yield frame(envelope | {"choices": [chunk]})
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
        except Exception as error:  # after any error, the reader must not wait for more
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


def _envelope(call: OpenAICall) -> Json:
    """Return the first fields of every chunk of a call, or of its whole answer."""
    kind = "text_completion"
    if call.chat:
        kind = "chat.completion.chunk" if call.stream else "chat.completion"
    prefix = "chatcmpl" if call.chat else "cmpl"
    return {"id": f"{prefix}-{call.id}", "object": kind, "created": call.created_s, "model": call.model}


def _usage(call: OpenAICall, choices: list[Choice]) -> Json:
    completion_tokens = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": call.num_prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": call.num_prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(request.num_cached_tokens for request in call.requests[:: call.n])
        },
    }
