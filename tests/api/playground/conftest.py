"""A real headless Chromium, and the page on a server that plays a script."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from model_server.api import playground
from tests.support.playground_page import ANSWER, Open
from tests.support.scripted_server import (
    ScriptedServer,
    answer_bytes,
)

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH (Debian's package chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="no Python package playwright")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    headers = {"Content-Type": playground.CONTENT_TYPE, **playground.headers()}
    page = answer_bytes(playground.page(), 200, **headers)
    with ScriptedServer([ANSWER], pages={"/playground": page}) as server:
        yield server


@pytest.fixture
def open_page(browser: Any, server: ScriptedServer) -> Iterator[Open]:
    """Open the page; afterwards check that it asked nobody else and broke no rule of its own."""
    contexts, hosts, faults = [], set(), []

    def go(**context: Any) -> Any:
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Policy" in message.text else None)
        page.goto(server.url + "/playground")
        return page

    yield go
    for context in contexts:
        context.close()
    assert hosts <= {server.url.removeprefix("http://"), ""}
    assert faults == []
