"""Clients that leave: at a random moment, in either lane, streamed or not."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from benchmarks.promises.served import Served, connections

WAYS_TO_ASK: Sequence[tuple[int, Mapping[str, Any]]] = (
    (35, {"stream": True}),
    (35, {}),
    (15, {"stream": True, "prompt_lookup_num_tokens": 3}),
    (15, {"num_beams": 4}),
)
"""How many in a hundred ask so: the last two go into the own lane."""
PATIENCE_S = (0.05, 20.0)
"""Most leave early, while queued or before the first token, some in the middle of a stream, few stay to the end."""


async def rude_client(
    server: Served, session: aiohttp.ClientSession, draw: random.Random, prompts: Sequence[str], seen: Counter[str]
) -> None:
    """Ask once and leave when patience ends; count in `seen` how far it came."""
    [way] = draw.choices([way for _, way in WAYS_TO_ASK], [weight for weight, _ in WAYS_TO_ASK])
    body = {"prompt": draw.choice(prompts), "max_new_tokens": 64, "temperature": 0, **way}
    patience_s = PATIENCE_S[0] * (PATIENCE_S[1] / PATIENCE_S[0]) ** draw.random()
    came = "left before the first byte"
    try:
        async with asyncio.timeout(patience_s), session.post(server.url, json=body) as response:
            async for _ in response.content:
                came = "left in the middle"
            came = "answered" if response.status == 200 else f"HTTP {response.status}"
    except TimeoutError:
        pass
    seen[came] += 1


async def rude_crowd(server: Served, prompts: Sequence[str], *, clients: int, at_once: int, seed: int) -> Counter[str]:
    """Let so many clients ask, `at_once` of them at any time; return how far they came."""
    seen: Counter[str] = Counter()
    draw = random.Random(seed)
    turn = asyncio.Semaphore(at_once)

    async def client(session: aiohttp.ClientSession) -> None:
        async with turn:
            await rude_client(server, session, draw, prompts, seen)

    async with connections() as session, asyncio.TaskGroup() as crowd:
        for _ in range(clients):
            crowd.create_task(client(session))
    return seen
