"""Throughput and latency of streamed answers: this server beside other systems, or a running server under load."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvloop

from benchmarks.checkpoint import prompts_for
from benchmarks.client import Target, asking
from benchmarks.comparison import compare
from benchmarks.figures import Figure, summary
from benchmarks.load import Run, closed_loop, least_disturbed
from benchmarks.systems import SYSTEMS, Server, System, serving


@dataclass(frozen=True)
class Plan:
    """The load that every system gets."""

    systems: Sequence[str] = tuple(SYSTEMS)
    clients: Sequence[int] = (1, 8, 32)
    repeats: int = 3
    prompt_tokens: Sequence[int] = (64,)
    max_new_tokens: int = 64
    min_seconds: float = 3
    limit_s: float = 10
    """A load is cut after this time: a server that answers one request at a time would need minutes."""

    def prompts(self, model_dir: Path) -> dict[int, Iterator[str]]:
        """Return prompts of each length; no load repeats a prompt of another."""
        return {
            length: itertools.cycle(prompts_for(model_dir, length, count=min(1024, 2**21 // length)))
            for length in self.prompt_tokens
        }

    def points(self) -> list[Figure]:
        return [
            {"benchmark": "serve", "prompt_tokens": length, "clients": clients}
            for length, clients in itertools.product(self.prompt_tokens, self.clients)
        ]


class SuspendedSystem:
    """A system of one benchmark run: started once, and suspended (SIGSTOP) while other systems are measured.

    A server whose load was cut may go on generating for clients that left: the next load gets a fresh process.
    """

    def __init__(self, system: System, model_dir: Path, plan: Plan) -> None:
        self._system, self._model_dir, self._plan = system, model_dir, plan
        self._prompts = plan.prompts(model_dir)
        self._running = contextlib.ExitStack()
        self._server: Server | None = None

    def measure(self, point: Figure) -> Figure:
        """Load the system and return the figure.

        Raises:
            ProgramFailed: it does not start, does not answer, or ends under load.
        """
        prompts = self._prompts[point["prompt_tokens"]]
        if self._server is None:
            starting = serving(self._system, self._model_dir, next(prompts), self._plan.max_new_tokens)
            self._server = self._running.enter_context(starting)
        program = self._server.program
        program.resume()
        run = uvloop.run(load(self._server.target, prompts, point["clients"], self._plan))
        if not program.running:
            raise program.failure("It ended under load.")
        figure = {**summary(run), "peak_memory_gb": program.peak_memory_bytes() / 1e9}
        if run.cut:
            self.close()
        else:
            program.suspend()
        return figure

    def close(self) -> None:
        self._running.close()
        self._server = None


async def load(target: Target, prompts: Iterator[str], clients: int, plan: Plan) -> Run:
    """Warm a server up with short answers, and load it."""
    async with asking(dataclasses.replace(target, max_new_tokens=2, extra={})) as warm_up:
        await closed_loop(warm_up, prompts, clients=clients, min_seconds=0, limit_s=plan.limit_s / 2)
    async with asking(target) as ask:
        loop = partial(closed_loop, ask, prompts, clients=clients, min_seconds=plan.min_seconds, limit_s=plan.limit_s)
        return await least_disturbed(loop)


def compare_systems(model_dir: Path, plan: Plan) -> list[Figure]:
    """Measure the systems of the plan in turn at each number of clients."""
    with contextlib.ExitStack() as stack:
        systems = {name: SuspendedSystem(SYSTEMS[name], model_dir, plan) for name in plan.systems}
        for system in systems.values():
            stack.callback(system.close)
        return compare(plan.systems, plan.points(), plan.repeats, lambda name, point: systems[name].measure(point))


def load_server(target: Target, tokenizer_dir: Path, plan: Plan) -> list[Figure]:
    """Load a running server; its figures have the URL in place of a system's name."""
    prompts = plan.prompts(tokenizer_dir)

    def measure(url: str, point: Figure) -> Figure:
        return summary(uvloop.run(load(target, prompts[point["prompt_tokens"]], point["clients"], plan)))

    return compare([target.url], plan.points(), plan.repeats, measure)
