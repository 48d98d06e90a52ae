"""The page shows an error in the server's words, and asks a busy server again."""

from __future__ import annotations

import pytest

from tests.support.playground_page import ANSWER, Open, ask, shows
from tests.support.scripted_server import (
    Act,
    ScriptedServer,
    answer_json,
    error_event,
    event,
    last_event,
    stream,
)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (answer_json({"error": "top_k is too odd.", "code": "bad_request"}, 400, x_request_id="r-7"),
         "top_k is too odd. (400, request r-7)"),
        (answer_json({"detail": "<b>not</b> markup"}, 404), "<b>not</b> markup (404)"),
        (stream(event("Hel"), error_event("The engine died.")), "The engine died."),
        (stream(event("Hel"), last_event(1)), "ended before it was complete"),
        (stream(event("Hel"), b"request timeout"), "request timeout ended the answer"),
        (stream(event("Hel"), whole=False), "The connection broke"),
    ],
    ids=["400", "404", "error event", "no DONE", "Knative", "dropped"],
)  # fmt: skip
def test_an_error_is_shown_in_the_servers_words(
    open_page: Open, server: ScriptedServer, bad: Act, sentence: str
) -> None:
    server.acts[:] = [bad, ANSWER]
    page = open_page()
    ask(page, "hi")
    shows(page, "[role=alert]", sentence)
    ask(page, "again")
    shows(page, "#status", "Done")
    assert page.text_content("[role=alert]") == ""


def test_a_server_that_is_not_ready_is_asked_again(open_page: Open, server: ScriptedServer) -> None:
    server.acts[:] = [answer_json({"error": "The model is loading."}, 503, retry_after="0"), ANSWER]
    page = open_page()
    ask(page, "hi")
    shows(page, "#status", "Done")
    assert len(server.asked) == 2


def test_a_wait_for_the_server_can_be_stopped(open_page: Open, server: ScriptedServer) -> None:
    server.acts[:] = [answer_json({"error": "The queue is full."}, 429, retry_after="600")]
    page = open_page()
    ask(page, "hi")
    shows(page, "#status", "The queue is full. (429) Asking again in 600 s.")
    page.keyboard.press("Escape")
    shows(page, "#status", "Stopped.")
    assert len(server.asked) == 1


def test_a_missing_key_leads_to_the_field_and_stays_in_the_tab(open_page: Open, server: ScriptedServer) -> None:
    server.acts[:] = [answer_json({"error": "A key is needed."}, 401), ANSWER]
    page = open_page()
    ask(page, "hi")
    shows(page, "[role=alert]", "A key is needed.")
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("k-1")
    ask(page, "hi")
    shows(page, "#status", "Done")
    page.reload()
    assert page.input_value("#key") == "k-1"
    assert page.evaluate("Object.values(localStorage).includes('k-1')") is False
    assert server.asked[1].headers["authorization"] == "Api-Key k-1"
