"""Eight streams beside a request with beams: the own lane may slow the shared one, never stop it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import aiohttp
import numpy as np

from benchmarks import report
from benchmarks.figures import ratios, spread
from benchmarks.load import Answer
from benchmarks.promises.checks import Check, at_least, at_most, told
from benchmarks.promises.plan import Plan
from benchmarks.promises.served import EVERY_PROMPT_READ, Served, connections, serve
from benchmarks.streams import stream_in_closed_loop

STREAMS = 8
SETTLE_S = 0.5
"""Left out after each change of the load."""
Window = tuple[float, float]


async def measure(plan: Plan) -> list[Check]:
    windows: dict[bool, list[Window]] = {False: [], True: []}
    with serve(plan.model_dir(), *EVERY_PROMPT_READ) as server:
        total_s = 2 * plan.repeats * (plan.window_s + 2 * SETTLE_S) + 2
        target = server.target(4096 - plan.prompt_tokens)
        streaming = asyncio.create_task(
            stream_in_closed_loop(
                target,
                server.prompts(plan.prompt_tokens, STREAMS),
                clients=STREAMS,
                min_seconds=0,
                limit_s=total_s,
            )
        )
        async with connections() as session:
            await server.until_running(session, STREAMS)
            await asyncio.sleep(1)
            for repeat in range(plan.repeats):
                for beams in (False, True):
                    report.progress.print(
                        f"beams: repeat {repeat + 1} of {plan.repeats}: {'with' if beams else 'without'}"
                    )
                    async with _one_beam_request(server, session) if beams else contextlib.nullcontext():
                        await asyncio.sleep(SETTLE_S)
                        windows[beams].append(await _watch(plan.window_s))
                    await asyncio.sleep(SETTLE_S)
        answers = (await streaming).answers
    rates = {beams: [_rate(answers, window) for window in windows[beams]] for beams in windows}
    gaps = {beams: [_gaps_s(answers, window) for window in windows[beams]] for beams in windows}
    p99 = {beams: [float(np.percentile(lot, 99)) for lot in gaps[beams]] for beams in gaps}
    return [
        told("8 streams alone, tokens/s", spread(rates[False])),
        told("beside 4 beams, tokens/s", spread(rates[True])),
        at_least("share of their tokens/s that the streams keep", ratios(rates[True], rates[False]), 0.4),
        told("p99 gap alone, ms", spread(1000 * s for s in p99[False])),
        told("p99 gap beside 4 beams, ms", spread(1000 * s for s in p99[True])),
        told("longest gap beside 4 beams, ms", 1000 * max(max(lot) for lot in gaps[True])),
        at_most("p99 gap, times that alone", ratios(p99[True], p99[False]), 4),
    ]


@contextlib.asynccontextmanager
async def _one_beam_request(server: Served, session: aiohttp.ClientSession) -> AsyncIterator[None]:
    """Keep one request with four beams running, by the client's leaving at the end."""
    prompt = server.prompts(64, 1, seed=7)[0]
    asking = asyncio.create_task(
        server.predict(session, prompt=prompt, temperature=0, num_beams=4, max_new_tokens=1500)
    )
    try:
        await server.until_running(session, STREAMS + 1)
        yield
        if asking.done():
            raise RuntimeError("The request with beams ended before the window did: nothing was measured beside it.")
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def _watch(seconds: float) -> Window:
    began_s = asyncio.get_running_loop().time()
    await asyncio.sleep(seconds)
    return began_s, asyncio.get_running_loop().time()


def _rate(answers: Sequence[Answer], window: Window) -> float:
    """Return pieces of text, one a token, per second of the window."""
    count = sum(window[0] <= at_s < window[1] for answer in answers for at_s in answer.chunk_times_s)
    return count / (window[1] - window[0])


def _gaps_s(answers: Sequence[Answer], window: Window) -> list[float]:
    gaps: list[float] = []
    for answer in answers:
        gaps += np.diff([at_s for at_s in answer.chunk_times_s if window[0] <= at_s < window[1]]).tolist()
    return gaps
