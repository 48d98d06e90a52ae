"""Contenders in a run: servers that stand still while another one is measured, and programs that measure themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import uvloop

from benchmarks.contenders import BARE, SERVERS, USUAL, Contender
from benchmarks.figures import Figure, summary
from benchmarks.load import Run, closed_loop, least_disturbed
from benchmarks.process import START_LIMIT_S, Program, StartFailed, free_port
from benchmarks.prompts import prompts_for
from benchmarks.streams import ask_once, asking
from benchmarks.wire import Target


@dataclass(frozen=True)
class Plan:
    """What every contender is asked for."""

    contenders: Sequence[str] = USUAL
    clients: Sequence[int] = (1, 8, 32)
    repeats: int = 3
    prompt_tokens: int = 64
    shared_tokens: int = 0
    """Of each prompt, the first so many are the same in all."""
    max_new_tokens: int = 64
    min_seconds: float = 3
    """Clients ask again until then."""
    limit_s: float = 10
    """What has not ended by then is cut: a server that answers one at a time would need minutes."""
    seed: int = 0


class Entrant(Protocol):
    """A contender in a run."""

    text: str
    """What it answers to the first prompt; known once it is measured."""

    def clients(self) -> Sequence[int]:
        """Return the numbers of clients that it is measured with."""

    def measure(self, clients: int) -> Figure:
        """Put it under load.

        Raises:
            StartFailed: it does not start, does not answer, or ends.
        """

    def close(self) -> None:
        """Stop what of it still runs."""


def entrant(name: str, model_dir: Path, plan: Plan) -> Entrant:
    if name == BARE:
        return BareEntrant(model_dir, plan)
    return ServerEntrant(SERVERS[name], model_dir, plan)


class ServerEntrant:
    """A server that is started once and frozen whenever it is not measured: neighbours in time take nothing from it.

    One whose load was cut may go on generating for clients that left. It is given as long as its start took to come to
    rest; else the next load gets a fresh one.
    """

    def __init__(self, contender: Contender, model_dir: Path, plan: Plan) -> None:
        self.text = ""
        self._contender, self._model_dir, self._plan = contender, model_dir, plan
        drawn = prompts_for(model_dir, plan.prompt_tokens, count=1024, seed=plan.seed, num_shared=plan.shared_tokens)
        self._first_prompt = drawn[0]
        # One iterator for all loads: nothing is asked for twice, so a server gains only by what prompts are said to
        # share.
        self._prompts = itertools.cycle(drawn)
        self._running = contextlib.ExitStack()
        self._server: Program | None = None
        self._target: Target
        self._start_s: float

    def clients(self) -> Sequence[int]:
        most = self._contender.most_clients
        return [clients for clients in self._plan.clients if most is None or clients <= most]

    def measure(self, clients: int) -> Figure:
        server = self._server or self._start()
        server.thaw()
        run = uvloop.run(_one_load(self._target, self._prompts, clients, self._plan))
        if not server.running:
            raise StartFailed(f"It ended under load. {server.log_end()}")
        figure = {**summary(run), "peak_memory_bytes": float(server.memory_bytes()["peak"])}
        if run.cut and not server.comes_to_rest(within_s=self._start_s):
            self.close()
        else:
            server.freeze()
        return figure

    def close(self) -> None:
        self._running.close()
        self._server = None

    def _start(self) -> Program:
        port = free_port()
        self._target = self._contender.target(self._model_dir, port, self._plan.max_new_tokens)
        with contextlib.ExitStack() as starting:
            server = starting.enter_context(Program(self._contender.command_for(self._model_dir, port)))
            self._start_s = server.wait_until_ready(port, self._contender.ready_path, START_LIMIT_S)
            first = uvloop.run(ask_once(self._target, self._first_prompt, START_LIMIT_S))
            if first.error or first.ended_s is None:
                raise StartFailed(f"Its first answer failed: {first.error or 'no answer'}. {server.log_end()}")
            self.text = first.text
            self._running = starting.pop_all()
        self._server = server
        return server


async def _one_load(target: Target, prompts: Iterator[str], clients: int, plan: Plan) -> Run:
    async with asking(dataclasses.replace(target, max_new_tokens=2)) as ask:
        await closed_loop(ask, prompts, clients=clients, min_seconds=0, limit_s=plan.limit_s / 2)
    async with asking(target) as ask:
        return await least_disturbed(
            lambda: closed_loop(ask, prompts, clients=clients, min_seconds=plan.min_seconds, limit_s=plan.limit_s)
        )


class BareEntrant:
    """`benchmarks.bare`, which puts itself under load and prints one JSON object; it runs only while it is measured."""

    def __init__(self, model_dir: Path, plan: Plan) -> None:
        self.text = ""
        self._limit_s = START_LIMIT_S + 3 * plan.limit_s
        numbers = (plan.prompt_tokens, plan.max_new_tokens, plan.min_seconds)
        self._command = [sys.executable, "-m", "benchmarks.bare", str(model_dir), *map(str, numbers)]

    def clients(self) -> Sequence[int]:
        return [1]

    def measure(self, clients: int) -> Figure:
        with Program(self._command) as program:
            program.wait_for_exit(self._limit_s)
            result = json.loads(program.log().splitlines()[-1])
        self.text = result["text"]
        figure: Figure = result["figure"]
        return figure

    def close(self) -> None:
        pass
