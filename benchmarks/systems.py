"""The systems that are compared, and how each is started, loaded and stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from benchmarks.checkpoint import prompts_for
from benchmarks.client import Target, asking
from benchmarks.figures import Figure, summary
from benchmarks.gguf_file import gguf_file
from benchmarks.load import Run, ask_once, closed_loop, least_disturbed
from benchmarks.process import START_LIMIT_S, Program, StartFailed, free_port

OURS, TRANSFORMERS_CB, ONE_AT_A_TIME, VLLM, LLAMA_CPP = "ours", "transformers-cb", "truss-1", "vllm", "llama-cpp"


@dataclass(frozen=True)
class System:
    """A server as its users start it; `{model_dir}` and `{port}` are filled in."""

    title: str
    command: tuple[str, ...]
    ready_path: str
    path: str
    max_clients: int | None = None
    """More clients would only wait in its queue."""
    executable: str = ""
    """The name of a program that is installed apart; `BENCHMARKS_<NAME>` in the environment gives its path."""
    environment: Mapping[str, str] = field(default_factory=dict)
    gguf: bool = False
    """Whether it reads the weights from a GGUF file."""

    def missing(self) -> str | None:
        """Return what to set when the system's program is not installed."""
        if not self.executable or shutil.which(self._program()):
            return None
        return f"{self.title} is not measured: set {self._variable()} to the path of its program, {self.executable}."

    def command_for(self, model_dir: Path, port: int) -> list[str]:
        model = gguf_file(model_dir) if self.gguf else model_dir
        program = [self._program()] if self.executable else []
        return [*program, *(part.format(model_dir=model, port=port) for part in self.command)]

    def program(self, model_dir: Path, port: int) -> Program:
        return Program(self.command_for(model_dir, port), self.environment)

    def _variable(self) -> str:
        return "BENCHMARKS_" + self.executable.upper().replace("-", "_")

    def _program(self) -> str:
        return os.environ.get(self._variable(), self.executable)

    def target(self, model_dir: Path, port: int, max_new_tokens: int) -> Target:
        return Target(f"http://127.0.0.1:{port}{self.path}", max_new_tokens, model=str(model_dir))


_V1 = "/v1/models/bench:predict"
_PYTHON = (sys.executable, "-m")
_OURS = (
    *_PYTHON, "model_server", "--model_dir", "{model_dir}", "--http_port", "{port}", "--model_name", "bench",
    "--watchdog_seconds", "0",  # a server that is not measured is frozen for minutes
)  # fmt: skip
_ADDRESS = ("--host", "127.0.0.1", "--port", "{port}")
_TRANSFORMERS = (*_PYTHON, "transformers.cli.transformers", "serve", "{model_dir}", *_ADDRESS)
_THREADS = (*_PYTHON, "benchmarks.thread_per_request", "{model_dir}", "{port}")
_HEALTH, _COMPLETIONS = "/health", "/v1/completions"

SYSTEMS: Mapping[str, System] = {
    OURS: System("this server", _OURS, "/v2/health/ready", _V1),
    TRANSFORMERS_CB: System(
        "transformers serve --continuous-batching", (*_TRANSFORMERS, "--continuous-batching"), _HEALTH, _COMPLETIONS
    ),
    "transformers": System("transformers serve", _TRANSFORMERS, _HEALTH, _COMPLETIONS, max_clients=8),
    ONE_AT_A_TIME: System("one request at a time (Truss's default)", (*_THREADS, "--concurrency", "1"), "/ready", _V1),
    "truss-all": System("a thread for each request", (*_THREADS, "--concurrency", "0"), "/ready", _V1),
    # Its default wants 92 % of the memory, on a CPU as well; the other systems need some of it.
    VLLM: System(
        "vLLM", ("serve", "{model_dir}", *_ADDRESS, "--gpu-memory-utilization", "0.4"), _HEALTH, _COMPLETIONS,
        executable="vllm", environment={"VLLM_NO_USAGE_STATS": "1"},
    ),
    # Its default is four requests at a time, and the context is divided between them.
    LLAMA_CPP: System(
        "llama.cpp", ("--model", "{model_dir}", *_ADDRESS, "--parallel", "32", "--ctx-size", "16384"),
        _HEALTH, _COMPLETIONS, executable="llama-server", gguf=True,
    ),
}  # fmt: skip


def installed(names: Sequence[str]) -> list[str]:
    """Return the systems whose programs are installed, and print how to install the others."""
    missing = {name: sentence for name in names if (sentence := SYSTEMS[name].missing())}
    for sentence in missing.values():
        print(sentence, file=sys.stderr)
    return [name for name in names if name not in missing]


@dataclass(frozen=True)
class Plan:
    """The load that every system gets."""

    systems: Sequence[str] = tuple(SYSTEMS)
    clients: Sequence[int] = (1, 8, 32)
    repeats: int = 3
    prompt_tokens: int = 64
    max_new_tokens: int = 64
    min_seconds: float = 3
    limit_s: float = 10
    """A load is cut after this time: a server that answers one request at a time would need minutes."""


class RunningSystem:
    """A system of one benchmark run: started once, and stopped (SIGSTOP) while other systems are measured.

    A server whose load was cut may go on generating for clients that left: the next load gets a fresh process.
    """

    def __init__(self, system: System, model_dir: Path, plan: Plan) -> None:
        self.clients = [n for n in plan.clients if system.max_clients is None or n <= system.max_clients]
        self._system, self._model_dir, self._plan = system, model_dir, plan
        # One iterator for all loads: no prompt is repeated.
        self._prompts = itertools.cycle(prompts_for(model_dir, plan.prompt_tokens, count=1024))
        self._program: Program | None = None
        self._running = contextlib.ExitStack()
        self._target: Target

    def measure(self, clients: int) -> Figure:
        """Load the system and return the figure.

        Raises:
            StartFailed: it does not start, does not answer, or ends under load.
        """
        server = self._program or self._start()
        server.thaw()
        run = uvloop.run(self._load(clients))
        if not server.running:
            raise StartFailed(f"It ended under load. {server.log_end()}")
        figure = {**summary(run), "peak_memory_bytes": float(server.peak_memory_bytes())}
        if run.cut:
            self.close()
        else:
            server.freeze()
        return figure

    def close(self) -> None:
        self._running.close()
        self._program = None

    def _start(self) -> Program:
        port = free_port()
        self._target = self._system.target(self._model_dir, port, self._plan.max_new_tokens)
        with contextlib.ExitStack() as starting:
            server = starting.enter_context(self._system.program(self._model_dir, port))
            server.wait_until_ready(port, self._system.ready_path, START_LIMIT_S)
            first = uvloop.run(ask_once(self._target, next(self._prompts), START_LIMIT_S))
            if first.error or first.ended_s is None:
                raise StartFailed(f"Its first answer failed: {first.error or 'no answer'}. {server.log_end()}")
            self._running = starting.pop_all()
        self._program = server
        return server

    async def _load(self, clients: int) -> Run:
        plan = self._plan
        async with asking(dataclasses.replace(self._target, max_new_tokens=2)) as warm_up:
            await closed_loop(warm_up, self._prompts, clients=clients, min_seconds=0, limit_s=plan.limit_s / 2)
        async with asking(self._target) as ask:
            return await least_disturbed(
                lambda: closed_loop(
                    ask, self._prompts, clients=clients, min_seconds=plan.min_seconds, limit_s=plan.limit_s
                )
            )
