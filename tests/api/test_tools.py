"""Tools over HTTP with a random model at temperature 1: whatever it answers, a call is a call of a tool."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tests.support.server_process import ServerProcess
from tests.support.small_tokenizers import with_tools

TOOL_CALLS_ID = with_tools().tool_calls_id
MODEL = "mistral-7b"
MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/City"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Paris", "Rome"]}},
}
PARAMETERS = {"get_weather": WEATHER, "roll": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "roll"}},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALL_AT_ONCE = {"logit_bias": {str(TOOL_CALLS_ID): 100}}
"""Makes the random model begin with the token that wakes the grammar."""


@pytest.fixture
def client(tool_server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tool_server.url}/openai/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **body: Any) -> Any:
    return client.chat.completions.create(**({"model": MODEL, "messages": MESSAGES, "tools": TOOLS} | body))


def predict(server: ServerProcess, **body: Any) -> httpx.Response:
    body = {"messages": MESSAGES, "tools": TOOLS, "max_new_tokens": 200} | body
    return httpx.post(f"{server.url}/v1/models/{MODEL}:predict", json=body, timeout=60)


def check(calls: list[Any]) -> None:
    """Assert that calls are calls of the tools, with arguments that fit, and ids of Mistral's form."""
    assert calls
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert re.fullmatch("[a-zA-Z0-9]{9}", call.id)
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS[call.function.name])


@pytest.mark.parametrize("wanted", [{"tool_choice": "required"}, {"tool_choice": "auto"} | CALL_AT_ONCE], ids=str)
def test_every_call_is_a_tool_with_arguments_that_fit(client: openai.OpenAI, wanted: dict[str, Any]) -> None:
    answer = chat(client, n=8, seed=1, parallel_tool_calls=False, **wanted)

    assert [choice.finish_reason for choice in answer.choices] == ["tool_calls"] * 8
    assert all(choice.message.content is None for choice in answer.choices)
    for choice in answer.choices:
        check(choice.message.tool_calls)
        assert len(choice.message.tool_calls) == 1


def test_several_calls_come_in_one_answer_unless_forbidden(client: openai.OpenAI) -> None:
    answer = chat(client, n=8, seed=1, tool_choice="required", max_tokens=200)

    counts = [len(choice.message.tool_calls) for choice in answer.choices if choice.finish_reason == "tool_calls"]
    assert max(counts) > 1


def test_a_named_tool_is_the_one_that_is_called(client: openai.OpenAI) -> None:
    answer = chat(client, n=8, seed=2, tool_choice=NAMED)

    assert [[call.function.name for call in c.message.tool_calls] for c in answer.choices] == [["get_weather"]] * 8


def test_no_tool_is_called_with_the_choice_none(client: openai.OpenAI) -> None:
    answer = chat(client, tool_choice="none", max_tokens=20, **CALL_AT_ONCE)

    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason in ("stop", "length")


def streamed(client: openai.OpenAI, **body: Any) -> tuple[str, list[dict[str, Any]], list[Any]]:
    """Return content, tool calls and chunks of a stream, put together as OpenAI's documentation does."""
    content, calls, chunks = "", [], list(chat(client, stream=True, **body))
    for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for delta in choice.delta.tool_calls or ():
                if delta.index == len(calls):
                    assert (delta.type, delta.function.arguments) == ("function", "")
                    calls.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
                calls[delta.index]["arguments"] += delta.function.arguments
    return content, calls, chunks


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_stream_put_together_is_the_whole_answer(client: openai.OpenAI, logprobs: bool) -> None:
    body = {"seed": 3, "tool_choice": "required", "logprobs": logprobs, "max_tokens": 200}
    whole = chat(client, **body)

    content, calls, chunks = streamed(client, **body, stream_options={"include_usage": True})

    expected = [(call.function.name, call.function.arguments) for call in whole.choices[0].message.tool_calls]
    assert [(call["name"], call["arguments"]) for call in calls] == expected
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", call["id"]) for call in calls)
    assert content == ""
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    if logprobs:
        tokens = [
            entry.token for c in chunks for choice in c.choices if choice.logprobs for entry in choice.logprobs.content
        ]
        assert tokens == [entry.token for entry in whole.choices[0].logprobs.content]
        assert tokens[0] == "[TOOL_CALLS]"


def test_openais_own_stream_helper_reads_the_calls_and_sends_them_back(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice=NAMED, seed=4
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    check(message.tool_calls)

    results = [{"role": "tool", "tool_call_id": call.id, "content": "20 degrees"} for call in message.tool_calls]
    again = chat(client, messages=[*MESSAGES, message, *results], max_tokens=4)

    assert again.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_a_cut_call_says_length_and_keeps_what_there_is(client: openai.OpenAI) -> None:
    whole = chat(client, tool_choice=NAMED, seed=6)

    cut = chat(client, tool_choice=NAMED, seed=6, max_tokens=whole.usage.completion_tokens - 6)
    cut_in_the_name = chat(client, tool_choice=NAMED, seed=6, max_tokens=6)

    assert [answer.choices[0].finish_reason for answer in (cut, cut_in_the_name)] == ["length", "length"]
    [[call], [cut_call]] = [answer.choices[0].message.tool_calls for answer in (whole, cut)]
    assert call.function.arguments.startswith(cut_call.function.arguments)
    assert cut_in_the_name.choices[0].message.tool_calls is None
    assert '[{"name": "get_weather"'.startswith(cut_in_the_name.choices[0].message.content.strip())


def test_a_stop_string_does_not_cut_a_call(client: openai.OpenAI) -> None:
    check(chat(client, tool_choice=NAMED, stop=["city", "}"]).choices[0].message.tool_calls)


def test_an_answer_fits_its_schema_or_calls_a_tool(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}

    called = chat(client, response_format=format, **CALL_AT_ONCE).choices[0].message
    answered = chat(client, response_format=format, logit_bias={str(TOOL_CALLS_ID): -100}).choices[0].message

    check(called.tool_calls)
    assert answered.tool_calls is None
    jsonschema.validate(json.loads(answered.content), schema)


def test_the_results_of_calls_are_sent_back_with_the_ids_of_any_server(client: openai.OpenAI) -> None:
    calls = chat(client, tool_choice="required", seed=3).choices[0].message
    function = {"name": "roll", "arguments": "{}"}
    foreign = [{"id": f"call_{i}-of-another-server", "type": "function", "function": function} for i in range(2)]
    asked = {"role": "assistant", "content": None, "tool_calls": foreign}
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "6"} for call in reversed(foreign)]

    own = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls.tool_calls]
    for loop in ([calls, *own], [asked, *results]):
        assert chat(client, messages=[*MESSAGES, *loop], max_tokens=5).choices[0].finish_reason == "length"


def test_a_prediction_has_the_calls(tool_server: ServerProcess) -> None:
    [prediction] = predict(tool_server, tool_choice=NAMED).json()["predictions"]

    assert (prediction["generated_text"], prediction["finish_reason"]) == ("", "tool_calls")
    [call] = prediction["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER)


def test_a_stream_of_predict_has_the_calls_in_its_last_event(tool_server: ServerProcess) -> None:
    body = {"tool_choice": NAMED, "seed": 3}
    [whole] = predict(tool_server, **body).json()["predictions"]

    events = [
        json.loads(line[6:]) for line in predict(tool_server, **body, stream=True).text.splitlines() if "{" in line
    ]

    assert [event["text"] for event in events] == [""]
    assert events[0]["tool_calls"][0]["function"] == whole["tool_calls"][0]["function"]


def test_instances_have_tools_each(tool_server: ServerProcess) -> None:
    instances = [{"messages": MESSAGES, "tools": TOOLS, "tool_choice": NAMED}, {"messages": MESSAGES}]

    response = httpx.post(
        f"{tool_server.url}/v1/models/{MODEL}:predict",
        json={"instances": instances, "parameters": {"max_new_tokens": 200}},
        timeout=60,
    )

    called, free = response.json()["predictions"]
    assert called["finish_reason"] == "tool_calls"
    assert "tool_calls" not in free


def test_plain_text_cannot_carry_calls(tool_server: ServerProcess) -> None:
    response = httpx.post(
        f"{tool_server.url}/v1/models/{MODEL}:predict",
        json={"messages": MESSAGES, "tools": TOOLS, "stream": True},
        headers={"Accept": "text/plain"},
    )

    assert response.status_code == 400
    assert response.json()["error"].startswith("tools need JSON or events")


def test_a_model_without_tool_tokens_says_so(server: ServerProcess) -> None:
    response = predict(server)

    assert response.status_code == 400
    assert response.json()["error"].startswith("tools: this model cannot call tools: its tokenizer has no tool tokens")
