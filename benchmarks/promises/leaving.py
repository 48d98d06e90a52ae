"""500 clients that leave at random moments: nothing of them stays."""

from __future__ import annotations

import asyncio

from benchmarks import report
from benchmarks.promises.checks import Check, at_most, exactly, told
from benchmarks.promises.plan import Plan
from benchmarks.promises.rude import rude_crowd
from benchmarks.promises.served import AT_REST_S, Holdings, Served, connections, serve

CLIENTS = 500
AT_ONCE = 64
"""More than run, fewer than run and wait."""


async def measure(plan: Plan) -> list[Check]:
    with serve(plan.model_dir()) as server:
        prompts = server.prompts(plan.prompt_tokens, 64)
        # What the first load costs once (thread stacks, the allocator's pools) is no leak.
        fresh = server.holdings()
        report.progress.print("leaving: warm-up")
        await rude_crowd(server, prompts, clients=CLIENTS // 2, at_once=AT_ONCE, seed=1)
        answer, before = await _quiet(server, prompts[0])
        report.progress.print(f"leaving: {CLIENTS} clients")
        seen = await rude_crowd(server, prompts, clients=CLIENTS, at_once=AT_ONCE, seed=2)
        async with connections() as session:
            gauges, seconds = await server.settle(session)
        again, after = await _quiet(server, prompts[0])
    return [
        told("how they left", ", ".join(f"{count} {how}" for how, count in seen.most_common())),
        exactly("running", gauges.running, 0),
        exactly("waiting", gauges.waiting, 0),
        exactly("KV use", gauges.kv_usage, 0),
        at_most("seconds until then", seconds, 2),
        at_most("memory more than before, MB", (after.rss_bytes - before.rss_bytes) / 1e6, 5),
        told("memory before them, more than fresh, MB", (before.rss_bytes - fresh.rss_bytes) / 1e6),
        at_most("threads more than before", after.threads - before.threads, 0),
        at_most("sockets more than before", after.sockets - before.sockets, 0),
        at_most("tasks more than before", after.tasks - before.tasks, 0),
        exactly("the next answer", "the same" if again == answer else "another", "the same"),
    ]


async def _quiet(server: Served, prompt: str) -> tuple[list[str], Holdings]:
    """Return an answer, and what the server holds once nothing runs and no connection is left."""
    async with connections() as session:
        await server.settle(session)
        # A seed has the whole prompt read: what is kept of it could be rounded otherwise.
        answer = await server.predict(session, prompt=prompt, temperature=0, seed=0, max_new_tokens=64)
    await asyncio.sleep(AT_REST_S)
    return answer, server.holdings()
