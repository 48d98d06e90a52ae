"""Who is compared: the command that serves a model directory, and how it is asked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.wire import Target


@dataclass(frozen=True)
class Contender:
    """A server as its users start it. `{model_dir}` and `{port}` stand in the templates."""

    title: str
    command: tuple[str, ...]
    ready_path: str
    path: str
    most_clients: int | None = None
    """It is not asked by more at a time: they would only stand in its line."""

    def command_for(self, model_dir: Path, port: int) -> list[str]:
        return [part.format(model_dir=model_dir, port=port) for part in self.command]

    def target(self, model_dir: Path, port: int, max_new_tokens: int) -> Target:
        return Target(f"http://127.0.0.1:{port}{self.path}", max_new_tokens, model=str(model_dir))


_TRANSFORMERS_SERVE = (
    sys.executable, "-m", "transformers.cli.transformers", "serve", "{model_dir}",
    "--host", "127.0.0.1", "--port", "{port}",
)  # fmt: skip
_THIS_SERVER = (
    # No watchdog: a server that is not measured is frozen for minutes.
    sys.executable, "-m", "model_server", "--model_dir", "{model_dir}", "--watchdog_seconds", "0",
    "--http_port", "{port}", "--model_name", "bench",
)  # fmt: skip
_BY_HAND = (sys.executable, "-m", "benchmarks.thread_per_request", "{model_dir}", "{port}")

OURS = "ours"
OURS_READING = "ours-reading"
"""Only of interest where prompts begin alike."""
TRANSFORMERS_CB = "transformers-cb"
BARE = "generate"

IN_PROCESS: Mapping[str, str] = {BARE: "model.generate in a loop"}
"""Not a server, but a program that measures itself: `bare`."""

SERVERS: Mapping[str, Contender] = {
    OURS: Contender(
        title="this server",
        command=_THIS_SERVER,
        ready_path="/v2/health/ready",
        path="/v1/models/bench:predict",
    ),
    OURS_READING: Contender(
        title="this server, reading every prompt whole (--prefix_caching false)",
        command=(*_THIS_SERVER, "--prefix_caching", "false"),
        ready_path="/v2/health/ready",
        path="/v1/models/bench:predict",
    ),
    TRANSFORMERS_CB: Contender(
        title="transformers serve --continuous-batching",
        command=(*_TRANSFORMERS_SERVE, "--continuous-batching"),
        ready_path="/health",
        path="/v1/completions",
    ),
    "transformers": Contender(
        title="transformers serve",
        command=_TRANSFORMERS_SERVE,
        ready_path="/health",
        path="/v1/completions",
        most_clients=8,
    ),
    "truss-1": Contender(
        title="thread and streamer a request, one at a time (Truss's default)",
        command=(*_BY_HAND, "--concurrency", "1"),
        ready_path="/ready",
        path="/v1/models/bench:predict",
    ),
    "truss-all": Contender(
        title="thread and streamer a request, all at once",
        command=(*_BY_HAND, "--concurrency", "0"),
        ready_path="/ready",
        path="/v1/models/bench:predict",
    ),
}

ALL = (OURS, *IN_PROCESS, *(name for name in SERVERS if name != OURS))
USUAL = tuple(name for name in ALL if name != OURS_READING)


def title(name: str) -> str:
    return IN_PROCESS.get(name) or SERVERS[name].title
