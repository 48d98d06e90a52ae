"""Relays in front of a server that plays a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mistral_relay import webhooks, worker
from mistral_relay.app import create_app
from mistral_relay.settings import Settings
from tests.support.relay import SECRET, Receiver
from tests.support.scripted_server import Act, ScriptedServer


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "POLL_S", 0.01)
    monkeypatch.setattr(worker, "RETRY_LATER_S", 0.01)
    monkeypatch.setattr(webhooks, "delay_s", lambda attempt: 0.01)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """A factory of relays in front of a server that plays acts; all share one database."""
    opened: list[Any] = []

    def make(*acts: Act, receiver: Receiver | None = None, **changes: Any) -> TestClient:
        server = ScriptedServer(list(acts)).__enter__()
        opened.append(server)
        (tmp_path / "secret").write_text(SECRET)
        settings = Settings(
            upstream_url=server.url, database=tmp_path / "relay.sqlite", webhook_hosts=("hooks.example.com",),
            webhook_secret_file=tmp_path / "secret", **changes,
        )  # fmt: skip
        client = TestClient(create_app(settings, transport=receiver or Receiver())).__enter__()
        client.upstream = server  # type: ignore[attr-defined]
        opened.append(client)
        return client

    yield make
    for thing in reversed(opened):
        thing.__exit__(None, None, None)
