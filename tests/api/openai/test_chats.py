"""Chats through OpenAI's own client."""

from __future__ import annotations

from typing import Any

import openai

from tests.support.openai_api import MESSAGES, NAME, Ask


def test_a_chat_streams_role_text_and_usage(ask: Ask) -> None:
    async def chunks(client: openai.AsyncOpenAI) -> Any:
        stream = await client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=5, seed=3, stream=True, stream_options={"include_usage": True}
        )
        return [chunk async for chunk in stream]

    first, *middle, last = ask(chunks)
    assert (first.choices[0].delta.role, first.choices[0].delta.content, first.usage) == ("assistant", "", None)
    assert middle[-1].choices[0].finish_reason in ("stop", "length")
    assert (last.choices, last.usage.completion_tokens) == ([], 5)


def test_a_chats_logprobs_carry_bytes_and_alternatives(ask: Ask) -> None:
    got = ask(
        lambda client: client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_completion_tokens=4, logprobs=True, top_logprobs=3, temperature=0
        )
    )
    content = got.choices[0].logprobs.content
    assert len(content) == got.usage.completion_tokens
    assert [len(token.top_logprobs) for token in content] == [3] * len(content)
    assert all(token.top_logprobs[0].logprob == token.logprob for token in content)
