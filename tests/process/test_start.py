"""The order of a start, with doubles for the model and the server's loop."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_server import __main__ as main
from model_server import model as model_module
from model_server import server as server_module
from model_server.compute.cpu import malloc
from tests.support.server_process import free_port


@pytest.fixture
def collecting() -> Iterator[None]:
    """Leave the garbage collector as it was."""
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.usefixtures("collecting")
def test_weights_are_prefetched_and_garbage_is_collected_only_once_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(malloc, "use_one_arena", lambda: seen.append("one arena"))
    monkeypatch.setattr(main, "prefetch_weights", lambda directory: seen.append(("prefetch", directory)))
    monkeypatch.setattr(
        model_module.MistralModel, "load", lambda model: seen.append(("loading collects", gc.isenabled()))
    )
    monkeypatch.setattr(server_module.Server, "run", lambda server: seen.append(("serving collects", gc.isenabled())))

    main.serve(["--model_dir", str(tmp_path), "--http_port", str(free_port()), "--configure_logging", "false"], {})

    assert seen == ["one arena", ("prefetch", tmp_path), ("loading collects", False), ("serving collects", True)]
    assert gc.get_freeze_count() > 0


@pytest.fixture
def loops() -> Iterator[None]:
    """Leave asyncio's own loop the default."""
    yield
    asyncio.set_event_loop_policy(None)


@pytest.mark.usefixtures("collecting", "loops")
@pytest.mark.parametrize(
    ("flags", "loop"),
    [((), "uvloop"), (("--event-loop", "uvloop"), "uvloop"), (("--event-loop", "asyncio"), "asyncio")],
)
def test_server_runs_in_the_configured_event_loop(
    flags: tuple[str, ...], loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran_in: list[str] = []

    def load(model: model_module.MistralModel) -> None:
        model.ready = True

    async def serve(server: server_module.Server) -> None:
        ran_in.append(type(asyncio.get_running_loop()).__module__.partition(".")[0])
        for coroutine in server.servers:
            coroutine.close()

    monkeypatch.setattr(malloc, "use_one_arena", lambda: None)
    monkeypatch.setattr(main, "prefetch_weights", lambda directory: None)
    monkeypatch.setattr(model_module.MistralModel, "load", load)
    monkeypatch.setattr(server_module.Server, "_serve", serve)

    argv = ["--model_dir", str(tmp_path), "--http_port", str(free_port()), "--configure_logging", "false", *flags]
    main.serve(argv, {})

    assert ran_in == [loop]
