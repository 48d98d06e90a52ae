"""Crowds over HTTP, short and without chance: a full queue, clients that leave. `make load` has the long forms."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from tests.support.server_process import ServerProcess

PREDICT = "/v1/models/mistral-7b:predict"
FOREVER = {"prompt": "hello", "max_new_tokens": 4000, "min_new_tokens": 4000, "temperature": 0}
SLOTS, QUEUE = 4, 16
PROMPTS = [f"hello {number}" for number in range(8)]
LEAVERS: list[dict[str, Any]] = [
    {"stream": True},
    {"stream": False},
    {"stream": True, "prompt_lookup_num_tokens": 3},
    {"stream": True, "guidance_scale": 1.5},
    {"stream": False, "num_beams": 4, "max_new_tokens": 2000, "min_new_tokens": 2000},
]
"""In the batch and in the fallback, streamed and not."""


@pytest.fixture(scope="module")
def small(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """A server with few places, in the batch and in the line."""
    return start_server("--max_batch_size", str(SLOTS), "--max_queue_size", str(QUEUE))


@pytest.fixture
async def client(small: ServerProcess) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=small.url, timeout=60, limits=limits) as client:
        yield client


async def ask(client: httpx.AsyncClient, prompt: str) -> httpx.Response:
    return await client.post(PREDICT, json={"prompt": prompt, "temperature": 0, "max_new_tokens": 24})


async def load(client: httpx.AsyncClient) -> tuple[float, float, float]:
    """Return how many run and wait, and the share of KV memory in use."""
    text = (await client.get("/metrics")).text
    names = ("mistral_requests_running", "mistral_requests_waiting", "mistral_kv_cache_usage_ratio")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    running, waiting, kv_usage = (float(values[name]) for name in names)
    return running, waiting, kv_usage


async def until(client: httpx.AsyncClient, running: int, waiting: int) -> None:
    async with asyncio.timeout(20):
        while (await load(client))[:2] != (running, waiting):
            await asyncio.sleep(0.02)


async def leave(*clients: asyncio.Task[Any]) -> None:
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


async def test_a_flood_is_answered_or_refused_and_the_answers_are_a_quiet_servers(client: httpx.AsyncClient) -> None:
    quiet = {prompt: (await ask(client, prompt)).json() for prompt in PROMPTS}
    running = [asyncio.create_task(client.post(PREDICT, json=FOREVER)) for _ in range(SLOTS)]
    await until(client, running=SLOTS, waiting=0)

    flood = [asyncio.create_task(ask(client, PROMPTS[number % 8])) for number in range(200)]
    await until(client, running=SLOTS, waiting=QUEUE)
    while sum(task.done() for task in flood) < len(flood) - QUEUE:
        await asyncio.wait([task for task in flood if not task.done()], return_when=asyncio.FIRST_COMPLETED)
    await leave(*running)
    responses = await asyncio.gather(*flood)

    assert Counter(r.status_code for r in responses) == {200: QUEUE, 429: 200 - QUEUE}
    assert all(int(r.headers["retry-after"]) >= 1 for r in responses if r.status_code == 429)
    answers = [(r.json(), PROMPTS[number % 8]) for number, r in enumerate(responses) if r.status_code == 200]
    assert all(answer == quiet[prompt] for answer, prompt in answers)


async def test_clients_that_leave_while_they_run_and_while_they_wait_leave_nothing(client: httpx.AsyncClient) -> None:
    before = (await ask(client, "hello")).json()

    # Of each way to ask four; the batch runs four and the fallback one, the others wait.
    crowd = [asyncio.create_task(client.post(PREDICT, json=FOREVER | way)) for way in LEAVERS for _ in range(4)]
    await until(client, running=SLOTS + 1, waiting=len(crowd) - SLOTS - 1)
    await leave(*crowd)
    await until(client, running=0, waiting=0)

    assert await load(client) == (0, 0, 0)
    assert (await ask(client, "hello")).json() == before
