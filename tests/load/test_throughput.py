"""Throughput and latency under load. Loads that are compared run in turn, three times, and medians count."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from itertools import product
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.client import Target, asking
from benchmarks.figures import summary
from benchmarks.load import Run, ask_once, closed_loop, least_disturbed
from tests.support.loaded_server import LoadedServer

pytestmark = pytest.mark.timeout(900)
NO_PREFIX_CACHE = ("--prefix_caching", "false")
REPEATS, PROBES, LIMIT_S = 3, 12, 300
StartLoaded = Callable[..., LoadedServer]


async def streams(
    target: Target, prompts: Sequence[str], clients: int, seconds: float = 0, limit_s: float = LIMIT_S
) -> Run:
    async with asking(target) as ask:
        cycle = itertools.cycle(prompts)
        return await closed_loop(ask, cycle, clients=clients, min_seconds=seconds, limit_s=limit_s)


async def first_token_s(server: LoadedServer, prompt: str) -> float:
    answer = await ask_once(server.target(2), prompt, LIMIT_S)
    assert answer.error is None
    return answer.chunk_times_s[0] - answer.asked_s


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of neighbouring repeats."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


async def test_a_batch_multiplies_throughput_and_a_longer_queue_does_not_lower_it(start_loaded: StartLoaded) -> None:
    server = start_loaded(*NO_PREFIX_CACHE)
    prompts, target = server.prompts(64, 256), server.target(64)
    await streams(dataclasses.replace(target, max_new_tokens=2), prompts, clients=32)
    rates: dict[int, list[float]] = {clients: [] for clients in (1, 8, 32, 128)}
    for repeat in range(REPEATS):
        for clients in rates if repeat % 2 == 0 else reversed(rates):
            figure = summary(await least_disturbed(partial(streams, target, prompts, clients, seconds=6)))
            assert (figure["errors"], figure["unfinished"]) == (0, 0)
            rates[clients].append(figure["output_tokens_per_s"])
    assert ratio(rates[8], rates[1]) >= 4
    assert ratio(rates[32], rates[1]) >= 8
    assert ratio(rates[128], rates[32]) >= 0.95  # 5 % for noise


async def test_streams_keep_two_fifths_of_their_throughput_beside_beams(start_loaded: StartLoaded) -> None:
    server = start_loaded(*NO_PREFIX_CACHE)
    windows: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    load = asyncio.create_task(streams(server.target(4032), server.prompts(64, 8), clients=8, limit_s=60))
    async with server.client() as client:
        await server.until_running(client, 8)
        for beams in [False, True] * REPEATS:
            async with contextlib.AsyncExitStack() as stack:
                if beams:
                    prompt = server.prompts(64, 1)[0]
                    request = server.predict(client, prompt=prompt, num_beams=4, max_new_tokens=1500)
                    await stack.enter_async_context(beside(server, client, request))
                await asyncio.sleep(0.5)
                began_s = time.perf_counter()
                await asyncio.sleep(6)
                windows[beams].append((began_s, time.perf_counter()))
    answers = (await load).answers
    rates: dict[bool, list[float]] = {False: [], True: []}
    p99: dict[bool, list[float]] = {False: [], True: []}
    for beams, (began_s, ended_s) in [*product([False], windows[False]), *product([True], windows[True])]:
        times = [[at_s for at_s in answer.chunk_times_s if began_s <= at_s < ended_s] for answer in answers]
        rates[beams].append(sum(map(len, times)) / (ended_s - began_s))
        p99[beams].append(float(np.percentile(np.concatenate([np.diff(each) for each in times]), 99)))
    assert ratio(rates[True], rates[False]) >= 0.4
    assert ratio(p99[True], p99[False]) <= 4


@contextlib.asynccontextmanager
async def beside(
    server: LoadedServer, client: httpx.AsyncClient, request: Coroutine[Any, Any, object]
) -> AsyncIterator[None]:
    """Keep a request running inside the block beside eight others."""
    task = asyncio.ensure_future(request)
    try:
        await server.until_running(client, 9)
        yield
        assert not task.done(), "the request with beams ended before the measurement did"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_new_request_gets_its_first_token_soon_beside_other_load(start_loaded: StartLoaded) -> None:
    server = start_loaded(*NO_PREFIX_CACHE)
    prompt, *others = server.prompts(64, 33)
    long_prompts = server.prompts(3000, PROBES)
    times: dict[str, list[float]] = {"idle": [], "decode": [], "prefill": [], "instances": []}

    async def probes() -> float:
        return statistics.median([await first_token_s(server, prompt) for _ in range(PROBES)])

    async def during_prefill(long_prompt: str) -> float | None:
        prefill = asyncio.create_task(ask_once(server.target(1), long_prompt, LIMIT_S))
        async with server.client() as client:
            await server.until_running(client, 1)
        seconds = await first_token_s(server, prompt)
        inside = not prefill.done()  # else the probe was answered after the prefill
        await prefill
        return seconds if inside else None

    await first_token_s(server, prompt)
    for _ in range(REPEATS):
        times["idle"].append(await probes())
        async with server.running(8, streams(server.target(4000), others[:8], clients=8)):
            times["decode"].append(await probes())
        inside = [seconds for each in long_prompts if (seconds := await during_prefill(each)) is not None]
        assert len(inside) >= PROBES // 2
        times["prefill"].append(statistics.median(inside))
        async with server.client() as client:
            parameters = {"max_new_tokens": 1500, "temperature": 0}
            body = {"instances": others, "parameters": parameters}
            async with server.running(28, client.post(server.url, json=body)):
                times["instances"].append(await probes())
    assert ratio(times["decode"], times["idle"]) <= 3
    assert ratio(times["prefill"], times["idle"]) <= 5
    assert ratio(times["instances"], times["idle"]) <= 5
