"""OpenAI's own clients against the server as a process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.support.server_process import ServerProcess

MESSAGES = [{"role": "user", "content": "hello world"}]
NO_END = {"2": -100}
"""For answers whose length is asked about: sampled ones may end with their first token."""


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/openai/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_is_answered_whole_and_streamed_alike(client: openai.OpenAI) -> None:
    asked = {"model": "mistral-7b", "messages": MESSAGES, "max_tokens": 12, "seed": 5}

    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]


def test_a_completion_is_answered_with_its_raw_response(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model="mistral-7b", prompt="hello", n=2, max_tokens=4, logprobs=1, logit_bias=NO_END
    )

    completion = raw.parse()
    assert raw.headers["x-request-id"]
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert [len(choice.logprobs.tokens) for choice in completion.choices if choice.logprobs] == [4, 4]


def test_what_an_evaluation_harness_asks_is_answered(client: openai.OpenAI) -> None:
    """`local-completions`: token ids in, the prompt's log-probabilities back, next to no tokens generated."""
    completion = client.completions.create(
        model="mistral-7b", prompt=[[1, 300, 301, 302]], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )

    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:4])


def test_the_async_client_streams(server: ServerProcess) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/openai/v1", api_key="none") as client:
            stream = await client.completions.create(
                model="mistral-7b", prompt="hello", max_tokens=8, logit_bias=NO_END, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(ask())


def test_errors_arrive_as_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="mistral-7b", messages=MESSAGES, temperature=9)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)

    assert wrong.value.param == "temperature"


def test_the_one_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mistral-7b"]
