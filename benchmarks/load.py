"""The load generator: streams asked for in a closed loop (a number of clients) or an open one (a rate).

Owns clients and clocks; how one is asked is in `streams`, what the times mean in `figures`. Every run is
bounded: what has not ended at the limit is cut and kept as unfinished, never dropped.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from benchmarks.stolen import Stolen

MOST_STOLEN = 0.03
"""Of the processors' time; a run that lost more is done again, `TRIES` times in all."""
TRIES = 3


@dataclass
class Answer:
    """One request as its client saw it. Times are seconds of one clock, since any moment."""

    asked_s: float
    """When it was due: in the open loop the arrival drawn, even if the client itself was late."""
    chunk_times_s: list[float] = field(default_factory=list)
    """When each piece of text arrived."""
    text: str = ""
    ended_s: float | None = None
    """None: cut at the limit."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """As the server counts; None when it does not say."""
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        """The server's own count, else one for each piece of text."""
        if self.completion_tokens is not None:
            return self.completion_tokens
        return len(self.chunk_times_s)


@dataclass(frozen=True)
class Run:
    """All answers to one load."""

    answers: Sequence[Answer]
    began_s: float
    ended_s: float
    """When the last text came, or the limit."""
    cut: bool
    """The limit ended it."""
    stolen: float
    """Share of the processors' time that the host gave to others meanwhile."""


Ask = Callable[[str, Answer], Coroutine[None, None, None]]
"""Sends one prompt and notes in the answer what comes back, and when."""


async def closed_loop(ask: Ask, prompts: Iterator[str], *, clients: int, min_seconds: float, limit_s: float) -> Run:
    """Keep `clients` streams open: each asks again when answered, until `min_seconds` have passed.

    Then it asks as often as the one that has asked most: few streams that outlast all the others would make a server
    that was a moment faster look slow. `prompts` have no end; loads of one server that draw from the same iterator ask
    for nothing twice.
    """
    most_asked = 0

    async def client(began_s: float, answers: list[Answer]) -> None:
        nonlocal most_asked
        asked = 0
        while asked < most_asked or time.perf_counter() - began_s < min_seconds or not asked:
            asked += 1
            most_asked = max(most_asked, asked)
            answers.append(answer := Answer(asked_s=time.perf_counter()))
            await ask(next(prompts), answer)
            if answer.error:
                return

    return await _bounded(limit_s, [client] * clients)


async def open_loop(
    ask: Ask, prompts: Iterator[str], *, rate: float, num_requests: int, seed: int, limit_s: float
) -> Run:
    """Ask at Poisson arrivals of `rate` a second, however slow the answers are."""
    arrivals = list(itertools.islice(poisson_arrivals(rate, seed), num_requests))

    async def client(began_s: float, answers: list[Answer], arrival_s: float) -> None:
        answers.append(answer := Answer(asked_s=began_s + arrival_s))
        await asyncio.sleep(answer.asked_s - time.perf_counter())
        await ask(next(prompts), answer)

    return await _bounded(limit_s, [partial(client, arrival_s=arrival_s) for arrival_s in arrivals])


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Yield arrival times in seconds without end, `rate` of them a second on average."""
    draw = random.Random(seed)
    return itertools.accumulate(draw.expovariate(rate) for _ in itertools.count())


async def least_disturbed(load: Callable[[], Awaitable[Run]]) -> Run:
    """Return a load's run; one that was robbed of more than `MOST_STOLEN` is done again, a few times at most.

    Whoever is measured is measured so: which run counts is decided by what was taken, not by what came out. A load that
    was cut is not repeated, as its server may still be generating for clients that left.
    """
    runs: list[Run] = []
    while len(runs) < TRIES:
        runs.append(await load())
        if runs[-1].stolen <= MOST_STOLEN or runs[-1].cut:
            break
    return min(runs, key=lambda run: run.stolen)


_Client = Callable[[float, list[Answer]], Coroutine[None, None, None]]
"""A client is told when the run began, and where to note its answers."""


async def _bounded(limit_s: float, clients: Sequence[_Client]) -> Run:
    answers: list[Answer] = []
    stolen = Stolen()
    began_s = time.perf_counter()
    tasks = [asyncio.create_task(client(began_s, answers)) for client in clients]
    try:
        done, late = await asyncio.wait(tasks, timeout=limit_s)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()  # a fault of ours ends the benchmark; a server's is in its answer
    last_text_s = max((answer.chunk_times_s[-1] for answer in answers if answer.chunk_times_s), default=began_s)
    # Requests of the open loop that were not due yet at the limit were never asked.
    asked = [answer for answer in answers if answer.asked_s <= began_s + limit_s]
    return Run(asked, began_s, began_s + limit_s if late else last_text_s, cut=bool(late), stolen=stolen.share())
