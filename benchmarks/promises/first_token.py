"""Time to first token of a newcomer: while others decode, while a long prompt is read, beside one greedy client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from benchmarks import report
from benchmarks.figures import ratios, spread
from benchmarks.promises.checks import Check, at_most, told
from benchmarks.promises.plan import Plan
from benchmarks.promises.served import EVERY_PROMPT_READ, Served, connections, serve
from benchmarks.streams import ask_once, stream_in_closed_loop

PROBES = 12
LONG_PROMPT_TOKENS = 3000
PROBES_PER_LONG_PROMPT = 2
LIMIT_S = 60
"""Of one answer."""

Probes = Callable[[Served, str], Awaitable[list[float]]]


async def measure(plan: Plan) -> list[Check]:
    alone, decoding, reading = await _beside(plan, _beside_decoding, _beside_a_long_prompt)
    return [
        told("alone, ms", _ms(alone)),
        told("while 8 decode, ms", _ms(decoding)),
        at_most("while 8 decode, times alone", ratios(decoding, alone), 3),
        told("while 3,000 tokens are read, ms", _ms(reading)),
        at_most("while 3,000 tokens are read, times alone", ratios(reading, alone), 5),
    ]


async def measure_fairness(plan: Plan) -> list[Check]:
    """One client has 32 instances running, another asks one short thing."""
    alone, beside, crowd = await _beside(
        plan, _beside_instances(1, max_new_tokens=1500, num_probes=PROBES), _beside_instances(4, 96, num_probes=1)
    )
    return [
        told("alone, ms", _ms(alone)),
        told("beside a call of 32 instances, ms", _ms(beside)),
        at_most("beside a call of 32 instances, times alone", ratios(beside, alone), 5),
        told("behind four such calls, every place taken, s", spread(crowd)),
    ]


async def _beside(plan: Plan, *loads: Probes) -> list[list[float]]:
    """Return the median time of probes alone and beside each load, a value for each repeat."""
    times: list[list[float]] = [[] for _ in range(1 + len(loads))]
    with serve(plan.model_dir(), *EVERY_PROMPT_READ) as server:
        prompts = server.prompts(plan.prompt_tokens, 1 + plan.repeats, seed=3)
        await _probe(server, prompts[-1])
        for repeat in range(plan.repeats):
            for number, load in enumerate((_alone, *loads)):
                report.progress.print(f"first token: repeat {repeat + 1} of {plan.repeats}: load {number}")
                times[number].append(spread(await load(server, prompts[repeat]))["median"])
    return times


async def _alone(server: Served, prompt: str) -> list[float]:
    return [await _probe(server, prompt) for _ in range(PROBES)]


async def _beside_decoding(server: Served, prompt: str) -> list[float]:
    streams = stream_in_closed_loop(
        server.target(4000), server.prompts(64, 8), clients=8, min_seconds=0, limit_s=LIMIT_S
    )
    async with _running(server, 8, streams):
        return [await _probe(server, prompt) for _ in range(PROBES)]


async def _beside_a_long_prompt(server: Served, prompt: str) -> list[float]:
    """Probe while a long prompt is read; a probe answered after it was not beside it and does not count."""
    times: list[float] = []
    for number in range(PROBES // PROBES_PER_LONG_PROMPT):
        long_prompt = server.prompts(LONG_PROMPT_TOKENS, 1, seed=number)[0]
        reading = asyncio.create_task(ask_once(server.target(1), long_prompt, LIMIT_S))
        async with connections() as session:
            await server.until_running(session, 1)
        for _ in range(PROBES_PER_LONG_PROMPT):
            seconds = await _probe(server, prompt)
            if not reading.done():
                times.append(seconds)
        answer = await reading
        if answer.error:
            raise RuntimeError(f"The long prompt was not answered: {answer.error}")
    if len(times) < PROBES // 2:
        raise RuntimeError(f"Only {len(times)} of {PROBES} probes were answered while a long prompt was read.")
    return times


def _beside_instances(calls: int, max_new_tokens: int, num_probes: int) -> Probes:
    """Probe while so many calls of 32 instances each are answered: one leaves places free, several take all."""

    async def probes(server: Served, prompt: str) -> list[float]:
        parameters = {"max_new_tokens": max_new_tokens, "temperature": 0}
        body = {"instances": server.prompts(64, 32, seed=5), "parameters": parameters}
        async with connections() as session:
            asking = [server.predict(session, **body) for _ in range(calls)]
            async with _running(server, 28, *asking):
                return [await _probe(server, prompt) for _ in range(num_probes)]

    return probes


@contextlib.asynccontextmanager
async def _running(server: Served, count: int, *load: Awaitable[object]) -> AsyncIterator[None]:
    """Keep a load running by its leaving at the end; it must not end before."""
    tasks = [asyncio.ensure_future(one) for one in load]
    try:
        async with connections() as session:
            begun = asyncio.ensure_future(server.until_running(session, count))
            await asyncio.wait([begun, *tasks], return_when=asyncio.FIRST_COMPLETED)
            begun.cancel()
            await asyncio.sleep(1.5)  # for the prompts to be read
            _check_goes_on(tasks)
            yield
            _check_goes_on(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with connections() as session:
            await server.settle(session)


def _check_goes_on(load: Sequence[asyncio.Future[object]]) -> None:
    for ended in (task for task in load if task.done()):
        ended.result()  # a refusal is its own explanation
        raise RuntimeError("The load ended before the probes did: they were not beside it.")


async def _probe(server: Served, prompt: str) -> float:
    answer = await ask_once(server.target(2), prompt, LIMIT_S)
    if answer.error or not answer.chunk_times_s:
        raise RuntimeError(f"A probe was not answered: {answer.error or 'no text'}")
    return answer.chunk_times_s[0] - answer.asked_s


def _ms(seconds: list[float]) -> dict[str, float]:
    return spread(1000 * s for s in seconds)
