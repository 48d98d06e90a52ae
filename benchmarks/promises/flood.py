"""2,000 requests at once against a short queue: answered or refused, never lost."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

import aiohttp

from benchmarks import report
from benchmarks.promises.checks import Check, at_least, exactly, told
from benchmarks.promises.plan import Plan
from benchmarks.promises.served import Served, connections, serve

REQUESTS = 2000
QUEUE = 128
PROMPTS = 24
MAX_NEW_TOKENS = 16
LIMIT_S = 180


@dataclass(frozen=True)
class Reply:
    status: int
    texts: list[str]
    retry_after: str | None
    seconds: float


async def measure(plan: Plan) -> list[Check]:
    # float32: in 16 bits a batch rounds differently from a single row, and a near tie may fall the other way.
    with serve(plan.model_dir("float32"), "--dtype", "float32", "--max_queue_size", str(QUEUE)) as server:
        prompts = server.prompts(plan.prompt_tokens, PROMPTS)
        async with connections() as session:
            expected = [
                await server.predict(session, prompt=prompt, temperature=0, max_new_tokens=MAX_NEW_TOKENS)
                for prompt in prompts
            ]
            report.progress.print(f"flood: {REQUESTS} requests")
            began_s = time.perf_counter()
            replies = await asyncio.gather(
                *(_ask(server, session, prompts[number % PROMPTS], began_s) for number in range(REQUESTS)),
                return_exceptions=True,
            )
            gauges, _ = await server.settle(session)
            again = await server.predict(session, prompt=prompts[0], temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    lost = Counter(type(reply).__name__ for reply in replies if isinstance(reply, BaseException))
    given = [(number, reply) for number, reply in enumerate(replies) if isinstance(reply, Reply)]
    statuses = Counter(reply.status for _, reply in given)
    refused = [reply for _, reply in given if reply.status == 429]
    wrong = sum(reply.texts != expected[number % PROMPTS] for number, reply in given if reply.status == 200)
    return [
        told("answered 200", statuses[200]),
        told("refused with 429", statuses[429]),
        exactly("anything else, lost or hung", f"{len(replies) - statuses[200] - statuses[429]}{_list(lost)}", "0"),
        at_least("answered, at least the places there are", statuses[200], 32 + QUEUE),
        exactly("refusals without Retry-After", sum(not (reply.retry_after or "").isdigit() for reply in refused), 0),
        exactly("answers unlike a quiet server's", wrong, 0),
        told("last refusal after, s", max((reply.seconds for reply in refused), default=0.0)),
        told("last answer after, s", max((reply.seconds for _, reply in given), default=0.0)),
        exactly("running and waiting afterwards", gauges.running + gauges.waiting, 0),
        exactly("the next answer", "the same" if again == expected[0] else "another", "the same"),
    ]


async def _ask(server: Served, session: aiohttp.ClientSession, prompt: str, began_s: float) -> Reply:
    body = {"prompt": prompt, "max_new_tokens": MAX_NEW_TOKENS, "temperature": 0}
    async with asyncio.timeout(LIMIT_S), session.post(server.url, json=body) as response:
        content = await response.json()
        texts = [one["generated_text"] for one in content.get("predictions", [])]
        return Reply(response.status, texts, response.headers.get("Retry-After"), time.perf_counter() - began_s)


def _list(counts: Counter[str]) -> str:
    return f" ({', '.join(f'{count} {name}' for name, count in counts.items())})" if counts else ""
