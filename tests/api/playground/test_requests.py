"""The page sends what the fields say, and nothing that the server would refuse."""

from __future__ import annotations

import json
import shlex

import pytest

from tests.support.playground_page import Open, ask, shows
from tests.support.scripted_server import (
    ScriptedServer,
)


def test_parameters_are_sent_as_they_are_set(open_page: Open, server: ScriptedServer) -> None:
    page = open_page()
    page.get_by_label("Temperature, slider").fill("0.5")
    page.get_by_label("Top k", exact=True).fill("7")
    page.get_by_label("Seed").fill("42")
    page.get_by_label("Stop strings").fill("END\n###")
    ask(page, "hi")
    shows(page, "#status", "Done")
    assert server.asked[0].body == {
        "prompt": "hi", "temperature": 0.5, "top_p": 0.75, "top_k": 7, "max_new_tokens": 512,
        "repetition_penalty": 1, "seed": 42, "stop": ["END", "###"], "stream": True,
    }  # fmt: skip


def test_a_schema_is_sent_with_the_request(open_page: Open, server: ScriptedServer) -> None:
    page = open_page()
    page.get_by_label("JSON schema").fill('{"type": "object"}')
    ask(page, "hi")
    shows(page, "#status", "Done")
    assert server.asked[0].body["json_schema"] == {"type": "object"}


@pytest.mark.parametrize(("field", "text"), [("JSON schema", "{"), ("JSON schema", "[]"), ("Tools", "{}")])
def test_json_that_is_none_is_not_sent(open_page: Open, server: ScriptedServer, field: str, text: str) -> None:
    page = open_page()
    page.get_by_text("Chat", exact=True).click()
    page.get_by_label(field).fill(text)
    ask(page, "hi")
    assert page.locator("textarea:invalid").count() == 1
    assert server.asked == []


@pytest.mark.parametrize(
    ("field", "value"), [("Temperature", "-1"), ("Top p", "0"), ("Top p", "1.1"), ("Max new tokens", "4097")]
)
def test_a_value_outside_the_bounds_is_not_sent(
    open_page: Open, server: ScriptedServer, field: str, value: str
) -> None:
    page = open_page()
    page.get_by_label(field, exact=True).fill(value)
    ask(page, "hi")
    assert page.locator("input:invalid").count() == 1
    assert server.asked == []


def test_the_curl_line_is_the_same_request(open_page: Open, server: ScriptedServer) -> None:
    page = open_page()
    page.get_by_label("API key").fill("secret")
    page.fill("#prompt", 'it\'s "quoted" $HOME\n\\n')
    curl = shlex.split(page.text_content("#curl"))
    page.keyboard.press("Control+Enter")
    shows(page, "#status", "Done")
    assert curl[2] == server.url + server.asked[0].path
    assert json.loads(curl[-1]) == server.asked[0].body
    assert "Authorization: Api-Key $MISTRAL_API_KEY" in curl
    assert server.asked[0].headers["authorization"] == "Api-Key secret"


def test_several_models_can_be_chosen_from(open_page: Open, server: ScriptedServer) -> None:
    server.models[:] = ["first", "second one"]
    page = open_page()
    page.get_by_label("Model").select_option("second one")
    ask(page, "hi")
    shows(page, "#status", "Done")
    assert server.asked[0].path == "/v1/models/second%20one:predict"
