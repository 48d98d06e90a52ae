"""Output tokens per second against the number of clients: a batch must pay, and a crowd must not cost."""

from __future__ import annotations

import dataclasses
import functools

from benchmarks import report
from benchmarks.figures import ratios, spread, summary
from benchmarks.load import least_disturbed
from benchmarks.promises.checks import Check, at_least, exactly, told
from benchmarks.promises.plan import Plan
from benchmarks.promises.served import EVERY_PROMPT_READ, serve
from benchmarks.streams import stream_in_closed_loop

CLIENTS = (1, 8, 32, 128)
LIMIT_S = 120
"""Of one load."""


async def measure(plan: Plan) -> list[Check]:
    rates: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
    errors = 0
    with serve(plan.model_dir(), *EVERY_PROMPT_READ) as server:
        target, prompts = server.target(plan.max_new_tokens), server.prompts(plan.prompt_tokens, 256)
        warm_up = dataclasses.replace(target, max_new_tokens=2)
        await stream_in_closed_loop(warm_up, prompts, clients=32, min_seconds=0, limit_s=LIMIT_S)
        load = functools.partial(stream_in_closed_loop, target, prompts, min_seconds=plan.window_s, limit_s=LIMIT_S)
        for repeat in range(plan.repeats):
            # There and back: a machine that grows slower or faster must not favour whoever comes first.
            for clients in CLIENTS if repeat % 2 == 0 else reversed(CLIENTS):
                report.progress.print(f"throughput: repeat {repeat + 1} of {plan.repeats}: {clients} clients")
                run = await least_disturbed(functools.partial(load, clients=clients))
                figure = summary(run)
                rates[clients].append(figure["output_tokens_per_s"])
                errors += figure["errors"] + figure["unfinished"]
    return [
        *(told(f"{clients} clients, tokens/s", spread(rates[clients])) for clients in CLIENTS),
        at_least("8 clients, times one", ratios(rates[8], rates[1]), 4),
        at_least("32 clients, times one", ratios(rates[32], rates[1]), 8),
        at_least("128 clients, times 32 (5 % for noise)", ratios(rates[128], rates[32]), 0.95),
        exactly("answers that failed", errors, 0),
    ]
