"""The load generator: a closed loop with a number of clients, bounded in time.

A request that has not ended at the limit is cut and kept as unfinished, never dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil

from benchmarks.client import Answer, Ask, Target, asking

MAX_CPU_STEAL = 0.03
"""Share of the CPU time that the host may take; a run that lost more is repeated, `MAX_TRIES` times in all."""
MAX_TRIES = 3


@dataclass(frozen=True)
class Run:
    """All answers to one load."""

    answers: Sequence[Answer]
    began_s: float
    ended_s: float
    """When the last text arrived, or the limit."""
    cut: bool
    """Whether the limit ended it."""
    cpu_steal: float
    """Share of the CPU time that the host of a virtual machine gave to others meanwhile; 0 if it is not reported."""


async def closed_loop(ask: Ask, prompts: Iterator[str], *, clients: int, min_seconds: float, limit_s: float) -> Run:
    """Keep `clients` streams open: each client asks again after its answer, until `min_seconds` have passed.

    Then each client asks until it has asked as often as the others: a few streams that outlast the rest would make a
    server that was a moment faster look slow. `prompts` is endless; loads that share it never repeat a prompt.
    """
    most_asked = 0
    answers: list[Answer] = []

    async def client() -> None:
        nonlocal most_asked
        asked = 0
        while asked < most_asked or time.perf_counter() - began_s < min_seconds or not asked:
            asked += 1
            most_asked = max(most_asked, asked)
            answers.append(answer := Answer(asked_s=time.perf_counter()))
            await ask(next(prompts), answer)
            if answer.error:
                return

    psutil.cpu_times_percent()  # the next call returns the shares since this one
    began_s = time.perf_counter()
    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    try:
        done, late = await asyncio.wait(tasks, timeout=limit_s)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()  # an error of the benchmark itself; the server's errors are in the answers
    last_text_s = max((answer.chunk_times_s[-1] for answer in answers if answer.chunk_times_s), default=began_s)
    ended_s = began_s + limit_s if late else last_text_s
    cpu_steal = getattr(psutil.cpu_times_percent(), "steal", 0.0) / 100
    return Run(answers, began_s, ended_s, cut=bool(late), cpu_steal=cpu_steal)


async def ask_once(target: Target, prompt: str, limit_s: float) -> Answer:
    """Send one request: a warm-up, or the first answer after a start."""
    async with asking(target) as ask:
        run = await closed_loop(ask, iter([prompt]), clients=1, min_seconds=0, limit_s=limit_s)
    return run.answers[0]


async def least_disturbed(load: Callable[[], Awaitable[Run]]) -> Run:
    """Return the run of a load with the least CPU steal: at most `MAX_TRIES`, one if it lost `MAX_CPU_STEAL` or less.

    CPU steal alone decides which run counts, never the result. A run that was cut is not repeated: its server may
    still be generating.
    """
    runs: list[Run] = []
    while len(runs) < MAX_TRIES:
        runs.append(await load())
        if runs[-1].cpu_steal <= MAX_CPU_STEAL or runs[-1].cut:
            break
    return min(runs, key=lambda run: run.cpu_steal)
