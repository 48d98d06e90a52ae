"""The page at `/playground`: what is served, and what it does in a real headless Chromium."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from model_server.api import playground
from tests.support.scripted_server import (
    DONE,
    Act,
    ScriptedServer,
    answer_bytes,
    answer_json,
    error_event,
    event,
    last_event,
    stream,
    until_gone,
)

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
ANSWER = stream(event("Forty"), event("-two, "), event("na\u00efve \U0001f642."), last_event(5), DONE)
ANSWER_TEXT = "Forty-two, na\u00efve \U0001f642."


# What is served


@pytest.fixture
def web() -> TestClient:
    return TestClient(Starlette(routes=[playground.route()]))


def test_the_page_is_served_with_a_policy_that_allows_only_its_own_code(web: TestClient) -> None:
    answer = web.get("/playground")
    policy = answer.headers["content-security-policy"]
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(re.findall("'sha256-[^']{44}'", policy)) == 2


def test_only_get_and_head_are_answered(web: TestClient) -> None:
    assert web.head("/playground").status_code == 200
    assert web.post("/playground").status_code == 405


def test_the_page_can_be_the_body_of_a_refusal() -> None:
    assert playground.response(401).status_code == 401
    assert playground.response(401).body == playground.page()


def test_the_page_names_no_other_host() -> None:
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+", playground.page().decode()))
    assert addresses == {"http://www.w3.org"}  # the namespace of SVG, never fetched


# In a browser


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


Open = Callable[..., Any]


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


def shows(page: Any, selector: str, text: str | re.Pattern[str]) -> None:
    """Wait until an element's text holds this."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text, timeout=20_000)


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Control+Enter")


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


def test_tool_calls_are_shown_and_each_result_is_asked_for(open_page: Open, server: ScriptedServer) -> None:
    calls = [
        {"id": f"call{i}abcd", "type": "function", "function": {"name": name, "arguments": '{"city": "Paris"}'}}
        for i, name in enumerate(["get_weather", "get_time"])
    ]
    tools = [{"type": "function", "function": {"name": call["function"]["name"]}} for call in calls]
    server.acts[:] = [stream(last_event(9, "tool_calls", tool_calls=calls), DONE), ANSWER]
    page = open_page()
    page.get_by_text("Chat", exact=True).click()
    page.get_by_label("Tools").fill(json.dumps(tools))

    ask(page, "How is Paris?")
    shows(page, ".made .call >> nth=0", 'get_weather({"city": "Paris"})')
    shows(page, "#prompt-label", "Result of get_weather")
    ask(page, "sunny")
    shows(page, "#prompt-label", "Result of get_time")
    ask(page, "noon")
    shows(page, ".made >> nth=1", ANSWER_TEXT)
    shows(page, "#prompt-label", "Message")

    assert server.asked[0].body["tools"] == tools
    assert server.asked[1].body["messages"] == [
        {"role": "user", "content": "How is Paris?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call0abcd", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call1abcd", "content": "noon"},
    ]


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


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (answer_json({"error": "top_k is too odd.", "code": "bad_request"}, 400, x_request_id="r-7"),
         "top_k is too odd. (400, request r-7)"),
        (answer_json({"detail": "<b>not</b> markup"}, 404), "<b>not</b> markup (404)"),
        (stream(event("Hel"), error_event("The engine died.")), "The engine died."),
        (stream(event("Hel"), last_event(1)), "ended before it was whole"),
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


def test_a_chat_sends_what_was_said_before(open_page: Open, server: ScriptedServer) -> None:
    page = open_page()
    page.get_by_text("Chat", exact=True).click()
    page.get_by_label("System message").fill("Be brief.")
    ask(page, "one")
    shows(page, "#status", "Done")
    ask(page, "two")
    shows(page, ".turn:nth-of-type(5)", ANSWER_TEXT)
    assert server.asked[1].body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": ANSWER_TEXT},
        {"role": "user", "content": "two"},
    ]


def test_a_refused_message_goes_back_to_the_field(open_page: Open, server: ScriptedServer) -> None:
    server.acts[:] = [answer_json({"error": "No chat template."}, 400)]
    page = open_page()
    page.get_by_text("Chat", exact=True).click()
    ask(page, "precious words")
    shows(page, "[role=alert]", "No chat template.")
    assert page.input_value("#prompt") == "precious words"
    assert page.locator(".turn").count() == 0


def test_an_answer_is_text_and_never_markup(open_page: Open, server: ScriptedServer) -> None:
    rude = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    server.acts[:] = [stream(event(rude), last_event(9), DONE)]
    page = open_page()
    ask(page, "hi")
    shows(page, ".made", rude)
    assert page.locator(".made *").count() == 0


def test_several_models_can_be_chosen_from(open_page: Open, server: ScriptedServer) -> None:
    server.models[:] = ["first", "second one"]
    page = open_page()
    page.get_by_label("Model").select_option("second one")
    ask(page, "hi")
    shows(page, "#status", "Done")
    assert server.asked[0].path == "/v1/models/second%20one:predict"


def test_the_theme_follows_the_system_until_it_is_chosen(open_page: Open) -> None:
    page = open_page(color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(20, 19, 17)"
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(paper) == "rgb(248, 246, 242)"
    page.reload()
    assert page.evaluate(paper) == "rgb(248, 246, 242)"


def test_every_control_has_a_name(open_page: Open) -> None:
    unnamed = """[...document.querySelectorAll("input, textarea, select, button")]
        .filter((e) => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).map((e) => e.outerHTML)"""
    assert open_page().evaluate(unnamed) == []


@pytest.mark.parametrize("width", [320, 390, 901])
def test_nothing_is_wider_than_the_window(open_page: Open, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 700})
    ask(page, "w" * 300)
    shows(page, "#status", "Done")
    assert page.evaluate("document.documentElement.scrollWidth") == width
