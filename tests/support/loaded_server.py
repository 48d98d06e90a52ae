"""A server under load: the requests that tests send, and its state from /metrics and /proc."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.checkpoint import prompts_for
from benchmarks.client import Target
from tests.support.server_process import ServerProcess

MODEL_NAME = "mistral-7b"
IDLE_LIMIT_S = 20


@dataclass(frozen=True)
class Resources:
    """The resources that the process holds."""

    rss_bytes: int
    threads: int
    sockets: int
    tasks: int

    def growth(self, before: Resources) -> list[str]:
        """Return the names of the resources that have grown since `before`; resident memory counts from 5 MB."""
        allowed = Resources(before.rss_bytes + 5_000_000, before.threads, before.sockets, before.tasks)
        now, most = vars(self), vars(allowed)
        return [f"{name}: {now[name]} > {most[name]}" for name in now if now[name] > most[name]]


class LoadedServer:
    """A process of `tests.support.instrumented_server`, and a client that opens a connection for each request."""

    def __init__(self, process: ServerProcess, model_dir: Path, tasks_file: Path) -> None:
        self.process, self._model_dir, self._tasks_file = process, model_dir, tasks_file
        self.url = f"{process.url}/v1/models/{MODEL_NAME}:predict"

    def target(self, max_new_tokens: int) -> Target:
        return Target(self.url, max_new_tokens)

    def prompts(self, num_tokens: int, count: int) -> list[str]:
        return prompts_for(self._model_dir, num_tokens, count)

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        return httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(None, connect=60))

    async def predict(self, client: httpx.AsyncClient, **body: Any) -> list[str]:
        """Return the texts of an answer; raise if the server refuses the request."""
        response = (await client.post(self.url, json={"temperature": 0, **body})).raise_for_status()
        return [prediction["generated_text"] for prediction in response.json()["predictions"]]

    async def gauges(self, client: httpx.AsyncClient) -> tuple[float, float, float]:
        """Return the numbers of running and waiting requests, and the share of the KV cache in use."""
        families = text_string_to_metric_families((await client.get(f"{self.process.url}/metrics")).text)
        values = {sample.name: sample.value for family in families for sample in family.samples}
        names = ("mistral_requests_running", "mistral_requests_waiting", "mistral_kv_cache_usage_ratio")
        running, waiting, kv_usage = (values[name] for name in names)
        return running, waiting, kv_usage

    async def until_running(self, client: httpx.AsyncClient, count: int) -> None:
        async with asyncio.timeout(IDLE_LIMIT_S):
            while (await self.gauges(client))[0] < count:
                await asyncio.sleep(0.05)

    async def until_idle(self) -> None:
        async with asyncio.timeout(IDLE_LIMIT_S), self.client() as client:
            while await self.gauges(client) != (0, 0, 0):
                await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def running(self, count: int, *load: Awaitable[object]) -> AsyncIterator[None]:
        """Keep a load running inside the block and cancel it at the end; raise if a load has ended earlier."""
        tasks = [asyncio.ensure_future(one) for one in load]
        try:
            async with self.client() as client:
                await self.until_running(client, count)
            await asyncio.sleep(1.5)  # until the prompts are prefilled
            yield
            for task in tasks:
                assert not task.done(), f"the load ended before the measurement did: {task.result()}"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.until_idle()

    async def resources(self) -> Resources:
        """Return the resources that the process holds; close the caller's connections first, because they count."""
        pid = self.process.process.pid
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        rss_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        self._tasks_file.unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR1)
        async with asyncio.timeout(IDLE_LIMIT_S):
            while not self._tasks_file.exists():
                await asyncio.sleep(0.01)
        return Resources(
            rss_bytes=1024 * rss_kib,
            threads=len(list(Path(f"/proc/{pid}/task").iterdir())),
            sockets=sum(map(_is_socket, Path(f"/proc/{pid}/fd").iterdir())),
            tasks=int(self._tasks_file.read_text()),
        )


def _is_socket(link: Path) -> bool:
    try:
        return os.readlink(link).startswith("socket:")
    except FileNotFoundError:
        return False
