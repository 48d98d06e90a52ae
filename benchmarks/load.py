"""The load generator: streams asked for in a closed loop (a number of clients) or an open one (a rate).

Owns clients and clocks; what is sent and read is in `wire`, what the times mean in `figures`. Every run is
bounded: what has not ended at the limit is cut and kept as unfinished, never dropped.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import aiohttp

from benchmarks.wire import Target, read_event


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


async def closed_loop(
    target: Target, prompts: Sequence[str], *, clients: int, min_seconds: float, limit_s: float
) -> Run:
    """Keep `clients` streams open: each asks again when answered, until `min_seconds` have passed."""
    prompt = itertools.cycle(prompts)

    async def client(session: aiohttp.ClientSession, began_s: float, answers: list[Answer]) -> None:
        while True:
            answers.append(answer := Answer(asked_s=time.perf_counter()))
            await _ask(session, target, next(prompt), answer)
            if answer.error or time.perf_counter() - began_s >= min_seconds:
                return

    return await _bounded(limit_s, target, [client] * clients)


async def open_loop(
    target: Target, prompts: Sequence[str], *, rate: float, num_requests: int, seed: int, limit_s: float
) -> Run:
    """Ask at Poisson arrivals of `rate` a second, however slow the answers are."""
    arrivals = list(itertools.islice(poisson_arrivals(rate, seed), num_requests))
    prompt = itertools.cycle(prompts)

    async def client(session: aiohttp.ClientSession, began_s: float, answers: list[Answer], arrival_s: float) -> None:
        answers.append(answer := Answer(asked_s=began_s + arrival_s))
        await asyncio.sleep(answer.asked_s - time.perf_counter())
        await _ask(session, target, next(prompt), answer)

    return await _bounded(limit_s, target, [partial(client, arrival_s=arrival_s) for arrival_s in arrivals])


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Yield arrival times in seconds without end, `rate` of them a second on average."""
    draw = random.Random(seed)
    return itertools.accumulate(draw.expovariate(rate) for _ in itertools.count())


async def ask_once(target: Target, prompt: str, limit_s: float) -> Answer:
    """Ask one thing alone: a warm-up, or a first answer after a start."""
    run = await closed_loop(target, [prompt], clients=1, min_seconds=0, limit_s=limit_s)
    return run.answers[0]


_Client = Callable[[aiohttp.ClientSession, float, list[Answer]], Coroutine[None, None, None]]
"""A client is told the session, when the run began, and where to note its answers."""


async def _bounded(limit_s: float, target: Target, clients: Sequence[_Client]) -> Run:
    answers: list[Answer] = []
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        headers=dict(target.headers),
    ) as session:
        began_s = time.perf_counter()
        tasks = [asyncio.create_task(client(session, began_s, answers)) for client in clients]
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
    return Run(asked, began_s, began_s + limit_s if late else last_text_s, cut=bool(late))


async def _ask(session: aiohttp.ClientSession, target: Target, prompt: str, answer: Answer) -> None:
    """Send one request and note in `answer` what comes back, and when."""
    try:
        async with session.post(target.url, json=target.body(prompt)) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return
            await _read(response.content, answer)
    except (aiohttp.ClientError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    if answer.error is None:
        answer.error = _incomplete(answer, target.max_new_tokens)


async def _read(lines: aiohttp.StreamReader, answer: Answer) -> None:
    finished = False
    texts: list[str] = []
    async for line in lines:
        now_s = time.perf_counter()
        event = read_event(line)
        if event is None:
            continue
        if event.error:
            answer.error = event.error
            return
        if event.text:
            answer.chunk_times_s.append(now_s)
            texts.append(event.text)
        finished |= event.finished
        if event.completion_tokens is not None:
            answer.prompt_tokens, answer.completion_tokens = event.prompt_tokens, event.completion_tokens
    if not finished:
        answer.error = "the stream ended without saying so"
        return
    answer.text = "".join(texts)
    answer.ended_s = time.perf_counter()


def _incomplete(answer: Answer, wanted: int) -> str | None:
    """A throughput counts only what was asked for, so an answer of another length is an error."""
    if answer.completion_tokens is not None and answer.completion_tokens != wanted:
        return f"asked for {wanted} tokens, got {answer.completion_tokens}"
    if not 0 < len(answer.chunk_times_s) <= wanted:
        return f"asked for {wanted} tokens, got {len(answer.chunk_times_s)} pieces of text"
    return None
