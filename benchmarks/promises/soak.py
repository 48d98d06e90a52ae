"""Minutes of full load with clients that leave: memory stays flat, and nothing is left over."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import aiohttp

from benchmarks import report
from benchmarks.figures import spread
from benchmarks.promises.checks import Check, at_most, exactly, told
from benchmarks.promises.plan import Plan
from benchmarks.promises.rude import rude_client
from benchmarks.promises.served import AT_REST_S, connections, serve

CLIENTS = 48
"""More than the batch holds, in both lanes."""
SAMPLE_S = 2


async def measure(plan: Plan) -> list[Check]:
    seen: Counter[str] = Counter()
    samples: list[float] = []
    draw = random.Random(0)
    with serve(plan.model_dir()) as server:
        prompts = server.prompts(plan.prompt_tokens, 64)

        async def client(session: aiohttp.ClientSession, end_s: float) -> None:
            while time.perf_counter() < end_s:
                await rude_client(server, session, draw, prompts, seen)

        async def crowd(seconds: float) -> None:
            end_s = time.perf_counter() + seconds
            async with connections() as session, asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(client(session, end_s))
                while time.perf_counter() < end_s:
                    await asyncio.sleep(SAMPLE_S)
                    samples.append(server.program.memory_bytes()["now"] / 1e6)

        async def rest() -> None:
            async with connections() as session:
                await server.settle(session)
            await asyncio.sleep(AT_REST_S)

        seconds = 60 * plan.soak_minutes
        report.progress.print(f"soak: {plan.soak_minutes:g} minutes")
        await rest()  # in its first pause a server has matmuls compiled, once
        # What a process grows to in its first crowd it keeps; what it holds at rest is compared from there on.
        await crowd(seconds / 20)
        await rest()
        before = server.holdings()
        samples.clear()
        await crowd(seconds)
        async with connections() as session:
            gauges, _ = await server.settle(session)
        await rest()
        after = server.holdings()
    quarter = max(1, len(samples) // 4)
    first, last = spread(samples[:quarter]), spread(samples[-quarter:])
    return [
        told("how the clients fared", ", ".join(f"{count} {how}" for how, count in seen.most_common())),
        told("memory in the first quarter, MB", first),
        told("memory in the last quarter, MB", last),
        at_most("last quarter more than the first, MB", last["median"] - first["median"], 5),
        at_most("at rest more than before, MB", (after.rss_bytes - before.rss_bytes) / 1e6, 5),
        exactly("running, waiting and KV use afterwards", gauges.running + gauges.waiting + gauges.kv_usage, 0),
        at_most("threads more than before", after.threads - before.threads, 0),
        at_most("sockets more than before", after.sockets - before.sockets, 0),
        at_most("tasks more than before", after.tasks - before.tasks, 0),
    ]
