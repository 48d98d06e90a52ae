"""A server with a model of 100 million random weights, for each test that asks for one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.checkpoint import checkpoint
from tests.support.loaded_server import MODEL_NAME, LoadedServer
from tests.support.server_process import ServerProcess

StartLoaded = Callable[..., LoadedServer]


@pytest.fixture
def start_loaded(tmp_path: Path) -> Iterator[StartLoaded]:
    """A factory of servers for load tests; all are stopped at the end."""
    started: list[ServerProcess] = []

    def start(*flags: str, dtype: str = "bfloat16") -> LoadedServer:
        model_dir = checkpoint("100m", dtype)
        tasks_file = tmp_path / f"tasks-{len(started)}"
        environ = {"OMP_NUM_THREADS": str(os.cpu_count()), "TASKS_FILE": str(tasks_file), "TMPDIR": str(tmp_path)}
        flags = ("--model_name", MODEL_NAME, "--dtype", dtype, *flags)
        process = ServerProcess(model_dir, *flags, environ=environ, module="tests.support.instrumented_server")
        started.append(process)
        process.wait_until_ready(180)
        return LoadedServer(process, model_dir, tasks_file)

    yield start
    for process in started:
        process.stop()
