"""The events of requests become one answer or one stream; a failure or a disconnect ends every choice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from model_server.api.openai.requests import parse_chat, parse_completion
from model_server.api.openai.responses import answer, sse
from model_server.errors import EngineDead
from model_server.request import FinishReason
from tests.support.fakes import play
from tests.support.openai_api import MESSAGES, NAME, SERVER


def test_a_failure_in_a_stream_is_raised_and_ends_the_other_choices() -> None:
    async def scenario() -> None:
        call = parse_completion({"model": NAME, "prompt": "a", "n": 2, "stream": True}, SERVER)
        play(call.requests[0], "begun", EngineDead("The engine died."))
        frames = await sse(call)
        assert b'"text":"begun"' in await anext(frames)
        with pytest.raises(EngineDead):
            await anext(frames)
        assert all(request.cancelled for request in call.requests)

    asyncio.run(scenario())


def test_a_failure_before_the_first_event_is_raised() -> None:
    async def scenario() -> None:
        call = parse_chat({"model": NAME, "messages": MESSAGES, "stream": True}, SERVER)
        play(call.requests[0], EngineDead("The engine died."))
        with pytest.raises(EngineDead):
            await sse(call)

    asyncio.run(scenario())


def test_leaving_a_stream_cancels_every_choice() -> None:
    async def scenario() -> None:
        call = parse_completion({"model": NAME, "prompt": "a", "n": 2, "stream": True}, SERVER)
        play(call.requests[0], "begun")
        frames = await sse(call)
        await anext(frames)
        await frames.aclose()  # type: ignore[attr-defined]
        assert all(request.cancelled for request in call.requests)

    asyncio.run(scenario())


def test_cancelling_the_wait_for_an_answer_cancels_every_choice() -> None:
    async def scenario() -> None:
        call = parse_completion({"model": NAME, "prompt": "a", "n": 2}, SERVER)
        task = asyncio.create_task(answer(call))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(request.cancelled for request in call.requests)

    asyncio.run(scenario())


def test_choices_keep_their_places_whichever_ends_first() -> None:
    async def scenario() -> Any:
        call = parse_chat({"model": NAME, "messages": MESSAGES, "n": 2}, SERVER)
        play(call.requests[1], "second", FinishReason.STOP)
        play(call.requests[0], "first", FinishReason.LENGTH)
        return await answer(call)

    got = asyncio.run(scenario())
    assert [choice["message"]["content"] for choice in got["choices"]] == ["first", "second"]
    assert got["usage"]["completion_tokens"] == 2
