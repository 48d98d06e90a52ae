"""OpenAI's Responses API with the official client: text, structured output, tools, streams; nothing is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel, Field

from tests.support.server_process import ServerProcess

MODEL = "mistral-7b"
LONG_ENOUGH = 400
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}


class Answer(BaseModel):
    colour: Literal["red", "green"]
    count: Annotated[int, Field(ge=0, le=9)]


@pytest.fixture
def client(tool_server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tool_server.url}/openai/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client: openai.OpenAI, **body: Any) -> Any:
    return client.responses.create(**({"model": MODEL, "input": "hello", "max_output_tokens": 8} | body))


def test_a_text_is_one_message_with_its_usage(client: openai.OpenAI) -> None:
    response = create(client, instructions="Be brief.", temperature=0, metadata={"a": "b"})

    assert Response.model_validate(response.model_dump(), strict=True)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output_text
    assert response.usage.output_tokens == 8
    assert response.usage.total_tokens == response.usage.input_tokens + 8
    assert (response.store, response.instructions, response.metadata) == (False, "Be brief.", {"a": "b"})


def test_a_response_answers_as_the_chat_does(client: openai.OpenAI) -> None:
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "world"},
        {"role": "user", "content": "and you?"},
    ]
    chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0)
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hel"}, {"type": "input_text", "text": "lo"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "world"}]},
        messages[2],
    ]

    response = create(client, input=items, temperature=0)

    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens


def test_an_answer_may_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    first = create(client, temperature=0)

    second = create(
        client, input=[{"role": "user", "content": "hello"}, *first.output, {"role": "user", "content": "?"}]
    )

    assert second.usage.input_tokens > first.usage.input_tokens


def test_the_events_of_a_stream_make_the_whole_answer(client: openai.OpenAI) -> None:
    whole = create(client, temperature=0)

    events = list(create(client, temperature=0, stream=True))

    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[0].response.output == []
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == 8


def test_the_client_parses_an_answer_and_a_stream_into_a_model(client: openai.OpenAI) -> None:
    wanted: dict[str, Any] = {"model": MODEL, "input": "hello", "text_format": Answer, "max_output_tokens": LONG_ENOUGH}

    parsed = client.responses.parse(**wanted)
    with client.responses.stream(**wanted) as stream:
        streamed = stream.get_final_response()

    assert isinstance(parsed.output_parsed, Answer)
    assert isinstance(streamed.output_parsed, Answer)
    assert parsed.status == "completed"


def test_a_json_schema_is_enforced(client: openai.OpenAI) -> None:
    form = {"format": {"type": "json_schema", "name": "answer", "schema": PARAMETERS, "strict": True}}

    response = create(client, text=form, max_output_tokens=LONG_ENOUGH)

    assert json.loads(response.output_text)["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_tool_is_called_and_its_result_sent_back(client: openai.OpenAI, choice: Any) -> None:
    question = {"role": "user", "content": "What is the weather?"}
    first = create(
        client,
        input=[question],
        tools=[TOOL],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_output_tokens=LONG_ENOUGH,
    )
    [call] = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"degrees": 20}'}

    second = create(client, input=[question, call, result], tools=[TOOL])

    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    assert second.usage.input_tokens > first.usage.input_tokens


def test_a_stream_of_a_call_has_its_arguments_piece_by_piece(client: openai.OpenAI) -> None:
    events = list(
        create(
            client,
            tools=[TOOL],
            tool_choice="required",
            parallel_tool_calls=False,  # random weights may make calls without end
            stream=True,
            max_output_tokens=LONG_ENOUGH,
        )
    )

    [call] = events[-1].response.output
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert events[-1].type == "response.completed"
    assert "".join(pieces) == call.arguments
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    assert [e.item.name for e in events if e.type == "response.output_item.added"] == ["get_weather"]


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"store": True}, "store", "keeps no responses"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses"),
        ({"background": True}, "background", "in the response to its request"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "does not reason"),
        ({"input": []}, "input", "input"),
        ({"input": [{"role": "user"}]}, "input", "input[0].content must be given"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "input[0].content[0]"),
        ({"input": [{"type": "reasoning", "id": "a"}]}, "input", "input[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input", "input[0]"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text", "schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}},
            "text",
            "text.format.schema",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0]"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools", "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"temperature": 3}, "temperature", "temperature must be"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_what_is_not_supported_is_refused_with_its_field(
    client: openai.OpenAI, body: dict[str, Any], param: str, part: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, **body)

    assert refused.value.param == param
    assert part in refused.value.message


def test_a_schema_that_reads_like_a_place_in_the_body_is_refused_in_its_own_words(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "messages[9]"}}, "required": ["a"]}
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, text={"format": {"type": "json_schema", "name": "a", "schema": schema}})
    assert "messages[9]" in str(refused.value)


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        create(client, model="gpt-5")
