"""SIGTERM with 32 streams running: they end whole, or each is told, and the process ends cleanly."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import aiohttp

from benchmarks import report
from benchmarks.process import StartFailed
from benchmarks.promises.checks import Check, at_most, exactly, told
from benchmarks.promises.plan import Plan
from benchmarks.promises.served import Served, connections, serve

STREAMS = 32
EXIT_LIMIT_S = 60


async def measure(plan: Plan) -> list[Check]:
    whole, exit_whole, _ = await _terminate(plan.model_dir(), plan.max_new_tokens * 4, drain_seconds=EXIT_LIMIT_S)
    cut, exit_cut, seconds = await _terminate(plan.model_dir(), 3000, drain_seconds=1)
    return [
        exactly("streams that ended with [DONE]", sum(text.endswith("data: [DONE]\n\n") for text in whole), STREAMS),
        exactly("exit", exit_whole, "0"),
        exactly("with --drain_seconds 1: ended with an error event", sum(map(_ends_in_error, cut)), STREAMS),
        exactly("exit", exit_cut, "0"),
        at_most("seconds from SIGTERM to the exit", seconds, 1 + 2),
        told("streams", STREAMS),
    ]


async def _terminate(model_dir: Path, max_new_tokens: int, drain_seconds: float) -> tuple[list[str], str, float]:
    """Return what 32 clients had read when their streams ended, how the process ended, and how soon."""
    report.progress.print(f"shutdown: --drain_seconds {drain_seconds:g}")
    with serve(model_dir, "--drain_seconds", str(drain_seconds)) as server:
        async with connections() as session:
            prompts = server.prompts(64, STREAMS)
            begun = asyncio.Semaphore(0)
            reading = [asyncio.create_task(_read(server, session, prompt, max_new_tokens, begun)) for prompt in prompts]
            for _ in reading:
                await begun.acquire()
            began_s = time.perf_counter()
            os.kill(server.program.pid, signal.SIGTERM)
            texts = await asyncio.gather(*reading)
        try:
            server.program.wait_for_exit(EXIT_LIMIT_S)
            end = "0"
        except StartFailed as error:
            end = str(error).split("\n")[0]
        return texts, end, time.perf_counter() - began_s


async def _read(
    server: Served, session: aiohttp.ClientSession, prompt: str, max_new_tokens: int, begun: asyncio.Semaphore
) -> str:
    """Return all of a stream; `begun` is told of its first event."""
    body = {"prompt": prompt, "max_new_tokens": max_new_tokens, "temperature": 0, "stream": True}
    async with session.post(server.url, json=body) as response:
        first = await response.content.readuntil(b"\n\n")
        begun.release()
        return (first + await response.content.read()).decode()


def _ends_in_error(text: str) -> bool:
    *_, last, rest = text.split("\n\n")
    return not rest and last.startswith("event: error\ndata: ") and '"draining"' in last
