"""The page shows an answer as it arrives, and can stop it."""

from __future__ import annotations

import itertools
import re
import threading

import pytest

from tests.support.playground_page import ANSWER_TEXT, Open, ask, shows
from tests.support.scripted_server import (
    DONE,
    ScriptedServer,
    event,
    last_event,
    stream,
    until_gone,
)


def test_typing_a_prompt_streams_the_answer_behind_it(open_page: Open, server: ScriptedServer) -> None:
    page = open_page()
    ask(page, "What is 6 times 7? ")
    shows(page, "#status", "Done, 5 tokens.")
    assert page.text_content(".turn") == "What is 6 times 7? " + ANSWER_TEXT
    assert page.text_content("#tokens") == "3 in, 5 out"
    assert re.fullmatch(r"\d+\.\d\d s", page.text_content("#first"))
    assert page.text_content("#ended") == "stop"
    assert server.asked[0].path == "/v1/models/mistral-7b:predict"
    assert "authorization" not in server.asked[0].headers


@pytest.mark.parametrize("by_key", [True, False], ids=["Escape", "button"])
def test_stopping_closes_the_connection_and_keeps_the_text(
    open_page: Open, server: ScriptedServer, by_key: bool
) -> None:
    gone = threading.Event()
    server.acts[:] = [stream(event("begun"), then=until_gone(gone, itertools.repeat(event(" more"))), whole=False)]
    page = open_page()
    ask(page, "hi")
    shows(page, ".made", "begun")
    page.keyboard.press("Escape") if by_key else page.get_by_role("button", name="Stop").click()
    assert gone.wait(20)
    shows(page, "#status", "Stopped.")
    shows(page, ".made", "begun")
    assert page.text_content("#ended") == "cancelled"


def test_an_answer_is_text_and_never_markup(open_page: Open, server: ScriptedServer) -> None:
    rude = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    server.acts[:] = [stream(event(rude), last_event(9), DONE)]
    page = open_page()
    ask(page, "hi")
    shows(page, ".made", rude)
    assert page.locator(".made *").count() == 0
