"""The systems that are compared, and how each is started."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from benchmarks.client import Target
from benchmarks.gguf_file import gguf_file
from benchmarks.load import ask_once
from benchmarks.process import START_LIMIT_S, Program, free_port

OURS, TRANSFORMERS_CB, ONE_AT_A_TIME, VLLM, LLAMA_CPP = "ours", "transformers-cb", "truss-1", "vllm", "llama-cpp"


@dataclass(frozen=True)
class System:
    """A server as its users start it."""

    command: tuple[str, ...]
    """`{model_dir}` and `{port}` are filled in."""
    ready_path: str
    path: str
    environment: Mapping[str, str] = field(default_factory=dict)
    weights: Callable[[Path], Path] = Path
    """Converts a checkpoint to the file format that the system reads."""

    def command_for(self, model_dir: Path, port: int) -> list[str]:
        return [part.format(model_dir=self.weights(model_dir), port=port) for part in self.command]


_V1 = "/v1/models/bench:predict"
_OPENAI = ("/health", "/v1/completions")
_ADDRESS = ("--host", "127.0.0.1", "--port", "{port}")
_PYTHON = (sys.executable, "-m")
SYSTEMS: Mapping[str, System] = {
    OURS: System(
        # The watchdog would end a server that is suspended for minutes.
        (*_PYTHON, "model_server", "--model_dir", "{model_dir}", "--http_port", "{port}", "--model_name", "bench",
         "--watchdog_seconds", "0"),
        "/v2/health/ready", _V1,
    ),
    TRANSFORMERS_CB: System(
        (*_PYTHON, "transformers.cli.transformers", "serve", "{model_dir}", *_ADDRESS, "--continuous-batching"),
        *_OPENAI,
    ),
    ONE_AT_A_TIME: System((*_PYTHON, "benchmarks.one_at_a_time", "{model_dir}", "{port}"), "/ready", _V1),
    VLLM: System(
        # Its default wants 92 % of the memory, on a CPU as well; the other systems need some of it.
        (os.environ.get("BENCHMARKS_VLLM", "vllm"), "serve", "{model_dir}", *_ADDRESS,
         "--gpu-memory-utilization", os.environ.get("BENCHMARKS_VLLM_MEMORY", "0.4")),
        *_OPENAI, environment={"VLLM_NO_USAGE_STATS": "1"},
    ),
    LLAMA_CPP: System(
        # Its default is four requests at a time, and the context is divided between them.
        (os.environ.get("BENCHMARKS_LLAMA_SERVER", "llama-server"), "--model", "{model_dir}", *_ADDRESS,
         "--parallel", "32", "--ctx-size", "16384"),
        *_OPENAI, weights=gguf_file,
    ),
}  # fmt: skip


def installed(names: Sequence[str]) -> list[str]:
    """Return the systems whose programs are installed, and print which are not."""
    found = [name for name in names if shutil.which(SYSTEMS[name].command[0])]
    for name in names:
        if name not in found:
            print(f"{name} is not measured: there is no program {SYSTEMS[name].command[0]}.", file=sys.stderr)
    return found


@dataclass(frozen=True)
class Server:
    """A system that runs and has answered a request."""

    program: Program
    target: Target
    ready_s: float
    first_token_s: float
    """Times since its start."""


@contextlib.contextmanager
def serving(system: System, model_dir: Path, prompt: str, max_new_tokens: int) -> Iterator[Server]:
    """Start a system, wait for its first answer, and stop it at the end of the block.

    Raises:
        ProgramFailed: it does not start or does not answer.
    """
    port = free_port()
    target = Target(f"http://127.0.0.1:{port}{system.path}", max_new_tokens, model=str(model_dir))
    with Program(system.command_for(model_dir, port), system.environment) as program:
        ready_s = program.wait_until_ready(port, system.ready_path, START_LIMIT_S)
        answer = uvloop.run(ask_once(target, prompt, START_LIMIT_S))
        if answer.error or answer.ended_s is None:
            raise program.failure(f"Its first answer failed: {answer.error or 'no answer'}.")
        yield Server(program, target, ready_s, answer.chunk_times_s[0] - program.started_s)
