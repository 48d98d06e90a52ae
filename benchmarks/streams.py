"""One request over HTTP: sent, read event by event as it comes, and held to the number of tokens asked for."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp

from benchmarks.load import Answer, Ask, Run, closed_loop
from benchmarks.wire import Target, read_event


@asynccontextmanager
async def asking(target: Target) -> AsyncIterator[Ask]:
    """Open a client with as many connections as there are requests at a time."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        headers=dict(target.headers),
    ) as session:
        yield functools.partial(_ask, session, target)


async def stream_in_closed_loop(
    target: Target, prompts: Sequence[str], *, clients: int, min_seconds: float, limit_s: float
) -> Run:
    """Keep so many streams open at a target (see `load.closed_loop`)."""
    async with asking(target) as ask:
        return await closed_loop(
            ask, itertools.cycle(prompts), clients=clients, min_seconds=min_seconds, limit_s=limit_s
        )


async def ask_once(target: Target, prompt: str, limit_s: float) -> Answer:
    """Ask one thing alone: a warm-up, or a first answer after a start."""
    async with asking(target) as ask:
        run = await closed_loop(ask, iter([prompt]), clients=1, min_seconds=0, limit_s=limit_s)
    return run.answers[0]


async def _ask(session: aiohttp.ClientSession, target: Target, prompt: str, answer: Answer) -> None:
    try:
        async with session.post(target.url, json=target.body(prompt)) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return
            await _read(response.content, answer)
    except (aiohttp.ClientError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    if answer.error is None:
        answer.error = incomplete(answer, target.max_new_tokens)


async def _read(content: aiohttp.StreamReader, answer: Answer) -> None:
    finished = False
    texts: list[str] = []
    begun = b""
    # Pieces as they arrive and not line by line, which costs twice the time of a client that shares the server's cores.
    async for piece in content.iter_any():
        now_s = time.perf_counter()
        *lines, begun = (begun + piece).split(b"\n")
        for event in filter(None, map(read_event, lines)):
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


def incomplete(answer: Answer, wanted: int) -> str | None:
    """Return why an answer does not count: a throughput is of exactly what was asked for."""
    if answer.completion_tokens is not None and answer.completion_tokens != wanted:
        return f"asked for {wanted} tokens, got {answer.completion_tokens}"
    if not 0 < len(answer.chunk_times_s) <= wanted:
        return f"asked for {wanted} tokens, got {len(answer.chunk_times_s)} pieces of text"
    return None
