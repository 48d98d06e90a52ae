"""OpenAI's own client, connected to a real small model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest
from transformers import MistralForCausalLM

from model_server.compute.fused_linear import fuse
from model_server.engine.engine import Engine
from tests.support.openai_api import VOCAB_SIZE, Ask, app_around
from tests.support.tiny_model import tiny_mistral


@pytest.fixture(scope="module")
def mistral() -> MistralForCausalLM:
    model = tiny_mistral(vocab_size=VOCAB_SIZE)
    fuse(model)
    return model


@pytest.fixture
def ask(make_engine: Callable[..., Engine], mistral: MistralForCausalLM) -> Ask:
    """Run a coroutine with OpenAI's client, connected to an engine."""
    engine = make_engine(mistral, max_model_len=64)

    def run(scenario: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
        async def connected() -> Any:
            transport = httpx.ASGITransport(app_around(engine))
            async with openai.AsyncOpenAI(
                base_url="http://test/openai/v1",
                api_key="k",
                max_retries=0,
                http_client=httpx.AsyncClient(transport=transport),
            ) as client:
                return await scenario(client)

        return asyncio.run(connected())

    return run
