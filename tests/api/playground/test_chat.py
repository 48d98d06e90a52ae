"""A chat sends the earlier turns and the results of tools."""

from __future__ import annotations

import json

from tests.support.playground_page import ANSWER, ANSWER_TEXT, Open, ask, shows
from tests.support.scripted_server import (
    DONE,
    ScriptedServer,
    answer_json,
    last_event,
    stream,
)


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
