"""A server to put under load: started, asked in any way, and watched through /metrics and /proc."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.contenders import OURS, SERVERS
from benchmarks.process import START_LIMIT_S, Program, free_port
from benchmarks.prompts import prompts_for
from benchmarks.wire import Target

EVERY_PROMPT_READ = ("--prefix_caching", "false")
"""Flags for measuring with prompts that repeat: all of each is to be read each time."""
AT_REST_S = 62
"""After so long without work the server has handed back what it kept of prompts (`model_server.engine.idle.REST_S`)."""
IDLE_LIMIT_S = 20
"""What is still running or waiting so long after the last client has gone will stay."""


@dataclass(frozen=True)
class Gauges:
    """What the server says it is doing."""

    running: float
    waiting: float
    kv_usage: float

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting or self.kv_usage)


@dataclass(frozen=True)
class Holdings:
    """What the process holds on to."""

    rss_bytes: int
    threads: int
    sockets: int
    tasks: int


class Served:
    """One running server."""

    def __init__(self, program: Program, model_dir: Path, port: int, tasks_file: Path) -> None:
        self.program = program
        self.model_dir = model_dir
        self._port = port
        self._tasks_file = tasks_file

    def target(self, max_new_tokens: int, **extra: Any) -> Target:
        """Return whom the load generator asks: greedy streams of so many tokens."""
        target = SERVERS[OURS].target(self.model_dir, self._port, max_new_tokens)
        return Target(target.url, max_new_tokens, extra=extra)

    @property
    def url(self) -> str:
        return self.target(1).url

    def prompts(self, num_tokens: int, count: int, seed: int = 0) -> list[str]:
        return prompts_for(self.model_dir, num_tokens, count=count, seed=seed)

    async def predict(self, session: aiohttp.ClientSession, **body: Any) -> list[str]:
        """Return the texts of an answer without stream.

        Raises:
            aiohttp.ClientResponseError: it was refused.
        """
        async with session.post(self.url, json=body, raise_for_status=True) as response:
            return [one["generated_text"] for one in (await response.json())["predictions"]]

    async def gauges(self, session: aiohttp.ClientSession) -> Gauges:
        async with session.get(f"http://127.0.0.1:{self._port}/metrics") as response:
            text = await response.text()
        found: Mapping[str, str] = dict(re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE))
        names = ("mistral_requests_running", "mistral_requests_waiting", "mistral_kv_cache_usage_ratio")
        return Gauges(*(float(found[name]) for name in names))

    async def until_running(self, session: aiohttp.ClientSession, count: int) -> None:
        async with asyncio.timeout(START_LIMIT_S):
            while (await self.gauges(session)).running < count:
                await asyncio.sleep(0.05)

    async def settle(self, session: aiohttp.ClientSession) -> tuple[Gauges, float]:
        """Wait until nothing runs or waits; return the last gauges and the seconds it took."""
        began_s = time.perf_counter()
        while True:
            gauges = await self.gauges(session)
            seconds = time.perf_counter() - began_s
            if gauges.idle or seconds > IDLE_LIMIT_S:
                return gauges, seconds
            await asyncio.sleep(0.05)

    def holdings(self) -> Holdings:
        """Return what the process holds now; connections of our own count, so close them before."""
        process = Path(f"/proc/{self.program.pid}")
        return Holdings(
            rss_bytes=self.program.memory_bytes()["now"],
            threads=len(list((process / "task").iterdir())),
            sockets=sum(_is_socket(link) for link in (process / "fd").iterdir()),
            tasks=self._num_tasks(),
        )

    def _num_tasks(self) -> int:
        self._tasks_file.unlink(missing_ok=True)
        os.kill(self.program.pid, signal.SIGUSR1)
        deadline_s = time.monotonic() + IDLE_LIMIT_S
        while not self._tasks_file.exists():
            if time.monotonic() > deadline_s:
                raise TimeoutError("The server's event loop does not answer a signal.")
            time.sleep(0.01)
        return int(self._tasks_file.read_text())


@contextmanager
def serve(model_dir: Path, *flags: str) -> Iterator[Served]:
    """Start a server and wait until it is ready; stop it at the end."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        tasks_file = Path(directory) / "tasks"
        server_flags = SERVERS[OURS].command_for(model_dir, port)[3:]
        command = [sys.executable, "-m", "benchmarks.promises.watched", str(tasks_file), *server_flags, *flags]
        with Program(command, {"TMPDIR": directory}) as program:
            program.wait_until_ready(port, SERVERS[OURS].ready_path, START_LIMIT_S)
            yield Served(program, model_dir, port, tasks_file)


def connections() -> aiohttp.ClientSession:
    """Return a session with a connection for each request: a client that leaves closes its own."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=aiohttp.ClientTimeout(total=None)
    )


def _is_socket(link: Path) -> bool:
    try:
        return os.readlink(link).startswith("socket:")
    except FileNotFoundError:
        return False
