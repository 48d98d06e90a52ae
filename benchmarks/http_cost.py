"""What HTTP costs: one server's engine asked over HTTP, and from inside its own process, in turn.

    python -m benchmarks.http_cost                     32 clients, eight rounds of each

The same process, the same memory, the same event loop: what differs is the way there and back, and the clients beside
it on the same cores. A round is one request of each client, all at once.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from benchmarks import report
from benchmarks.contenders import OURS, SERVERS
from benchmarks.figures import Figure, ratios, spread, summary
from benchmarks.load import Answer, Ask, Run, closed_loop, least_disturbed
from benchmarks.models import checkpoint
from benchmarks.process import START_LIMIT_S, Program, StartFailed, free_port, stop_children_on_sigterm
from benchmarks.prompts import prompts_for
from benchmarks.streams import asking, incomplete

if TYPE_CHECKING:
    from model_server.model import MistralModel

NUM_TOKENS = 64
"""Of each prompt, and of each answer."""
LIMIT_S = 60


def compare(model_dir: Path, *, clients: int = 32, rounds: int = 8) -> list[Figure]:
    """Start a server and return what its engine gave over HTTP and inside, and the ratio of neighbouring rounds.

    Raises:
        StartFailed: it does not start, or does not answer.
    """
    port = free_port()
    target = SERVERS[OURS].target(model_dir, port, NUM_TOKENS)
    prompts = itertools.cycle(prompts_for(model_dir, NUM_TOKENS, count=1024))
    measured: dict[str, list[Figure]] = {"inside": [], "over HTTP": []}
    with Program([sys.executable, "-m", "benchmarks.http_cost", "--serve", str(model_dir), str(port)]) as server:
        server.wait_until_ready(port, SERVERS[OURS].ready_path, START_LIMIT_S)

        async def over_http() -> Run:
            async with asking(target) as ask:
                return await one_round(ask, prompts, clients)

        def measure(where: str) -> Figure:
            if where == "over HTTP":
                return summary(uvloop.run(over_http()))
            url = f"http://127.0.0.1:{port}/inside/{clients}"
            with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=4 * LIMIT_S) as answer:
                found: Figure = json.load(answer)
            return found

        for where in measured:  # warmed up
            measure(where)
        for number in range(rounds):
            report.progress.print(f"http cost: round {number + 1} of {rounds}")
            for where in measured if number % 2 == 0 else reversed(measured):
                figure = measure(where)
                if figure["errors"]:
                    raise StartFailed(f"{where}: {figure['error_examples'][0]}. {server.log_end()}")
                measured[where].append(figure)
    rates = {where: [figure["output_tokens_per_s"] for figure in of] for where, of in measured.items()}
    return [
        {
            "benchmark": "http cost",
            "clients": clients,
            "rounds": rounds,
            "stolen": spread(figure["stolen"] for of in measured.values() for figure in of),
            "inside_tokens_per_s": spread(rates["inside"]),
            "over_http_tokens_per_s": spread(rates["over HTTP"]),
            "of_inside": ratios(rates["over HTTP"], rates["inside"]),
        }
    ]


async def one_round(ask: Ask, prompts: Iterator[str], clients: int) -> Run:
    return await least_disturbed(
        functools.partial(closed_loop, ask, prompts, clients=clients, min_seconds=0, limit_s=LIMIT_S)
    )


def serve(model_dir: str, port: str) -> None:
    """Be the server, with a route more: `POST /inside/{clients}` is a round that its own process asks for."""
    import model_server.api.routes
    from model_server.__main__ import serve as serve_model

    # Other prompts than those over HTTP: nothing is asked for twice.
    prompts = itertools.cycle(prompts_for(Path(model_dir), NUM_TOKENS, count=1024, seed=1))

    def with_inside(model: MistralModel, **options: Any) -> Any:
        app = create_app(model, **options)

        @app.post("/inside/{clients}", include_in_schema=False)
        async def inside(clients: int) -> Figure:
            return summary(await one_round(asking_inside(model), prompts, clients))

        return app

    create_app: Callable[..., Any] = model_server.api.routes.create_app
    model_server.api.routes.create_app = with_inside  # type: ignore[assignment]
    serve_model(["--model_dir", model_dir, "--http_port", port, "--model_name", "bench"], os.environ)


def asking_inside(model: MistralModel) -> Ask:
    """Return what has a prompt answered as `predict` does, up to where an answer would become HTTP."""
    from model_server.api.predict import parse
    from model_server.request import Finished, TextDelta

    async def ask(prompt: str, answer: Answer) -> None:
        engine = model.llm_engine
        assert engine is not None, "a server that answers has loaded"
        body = {"prompt": prompt, "max_new_tokens": NUM_TOKENS, "temperature": 0}
        call = await asyncio.to_thread(parse, body, model.text, model.limits)
        engine.submit(call.requests)
        async for event in call.requests[0].answer():
            if isinstance(event, TextDelta):
                answer.chunk_times_s.append(time.perf_counter())
                answer.text += event.text
            elif isinstance(event, Finished):
                answer.prompt_tokens, answer.completion_tokens = event.prompt_tokens, event.completion_tokens
        answer.ended_s = time.perf_counter()
        answer.error = incomplete(answer, NUM_TOKENS)

    return ask


def card(figures: list[Figure]) -> None:
    report.table(
        "Over HTTP and inside the same process: medians (least-most)",
        ["clients", "inside, tokens/s", "over HTTP", "x inside"],
        [
            [
                str(f["clients"]),
                report.measured(f["inside_tokens_per_s"]),
                report.measured(f["over_http_tokens_per_s"]),
                report.measured(f["of_inside"], digits=2),
            ]
            for f in figures
        ],
    )


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        model_dir, port = sys.argv[2:]
        del sys.argv[1:]  # KServe reads the command line when it is imported
        serve(model_dir, port)
        os._exit(0)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    stop_children_on_sigterm()
    report.announce(report.machine())
    figures = compare(checkpoint("100m", "bfloat16"), clients=options.clients, rounds=options.rounds)
    card(figures)
    report.print_json_lines(figures)


if __name__ == "__main__":
    main()
