"""Structured output over HTTP: every API takes its fields, and every complete answer fits what was asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.support.server_process import ServerProcess
from tests.support.small_tokenizers import byte_fallback

TEXT = byte_fallback()
MESSAGES = [{"role": "user", "content": "hello world"}]
CHOICES = ["yes", "no", "maybe"]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
HOT = {"temperature": 1, "top_p": 1, "top_k": 0, "max_new_tokens": 400}
LONG_ENOUGH = 400
"""Tokens for any text of the grammars here, white space included."""


def fits_schema(text: str) -> bool:
    return jsonschema.validate(json.loads(text), SCHEMA) is None


FIELDS = [
    ({"json_schema": SCHEMA}, fits_schema),
    ({"regex": "[0-9]{4}-[a-f]{2}"}, lambda text: re.fullmatch("[0-9]{4}-[a-f]{2}", text)),
    ({"choice": CHOICES}, lambda text: text in CHOICES),
    ({"grammar": 'start: "a" "b"? | /c{2,4}/'}, lambda text: re.fullmatch("ab?|c{2,4}", text)),
]
each_kind = pytest.mark.parametrize(("fields", "fits"), FIELDS, ids=[next(iter(fields)) for fields, _ in FIELDS])


def post(server: ServerProcess, path: str = "/v1/models/mistral-7b:predict", **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/openai/v1", api_key="none", max_retries=0) as client:
        yield client


@each_kind
def test_predictions_fit_what_was_asked(server: ServerProcess, fields: dict[str, Any], fits: Any) -> None:
    body = HOT | fields | {"prompt": "hello", "num_return_sequences": 8, "seed": 1}

    predictions = post(server, **body).json()["predictions"]

    assert [p["finish_reason"] for p in predictions] == ["stop"] * 8
    assert all(fits(p["generated_text"]) for p in predictions)


def test_instances_have_a_grammar_each(server: ServerProcess) -> None:
    instances = [{"prompt": "a", "regex": "x{3}"}, {"prompt": "b", "choice": ["yes"]}, {"messages": MESSAGES}]

    predictions = post(server, instances=instances, parameters={"max_new_tokens": 20}).json()["predictions"]

    assert [p["generated_text"] for p in predictions[:2]] == ["xxx", "yes"]


def test_a_stream_joined_is_the_whole_answer(server: ServerProcess) -> None:
    body = HOT | {"prompt": "hello", "json_schema": SCHEMA, "seed": 3}
    [whole] = post(server, **body).json()["predictions"]

    frames = [json.loads(line[6:]) for line in post(server, **body, stream=True).text.splitlines() if "{" in line]

    assert "".join(frame["text"] for frame in frames) == whole["generated_text"]
    assert frames[-1]["finish_reason"] == "stop"


def test_an_answer_that_is_cut_says_length(server: ServerProcess) -> None:
    [prediction] = post(server, prompt="hello", regex="x{50}", max_new_tokens=5).json()["predictions"]

    assert prediction["finish_reason"] == "length"
    assert set(prediction["generated_text"]) == {"x"}


@each_kind
def test_a_truss_answers_the_prompt_and_what_fits(server: ServerProcess, fields: dict[str, Any], fits: Any) -> None:
    body = HOT | fields | {"prompt": "hello", "seed": 2, "return_full_text": False, "skip_special_tokens": True}

    assert fits(post(server, "/predict", **body).json())


def test_beams_with_a_grammar_are_refused(server: ServerProcess) -> None:
    response = post(server, prompt="hello", regex="a", num_beams=2)

    assert response.status_code == 400
    assert response.json()["error"] == "num_beams does not work with regex: leave one out."


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "minItems": 10**9, "items": {}},
        {"properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
        {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 50}}, "$ref": "#/$defs/a"},
    ],
    ids=["items", "properties", "pattern", "recursion"],
)
def test_a_hostile_schema_is_refused_or_answered_and_the_server_goes_on(
    server: ServerProcess, schema: dict[str, Any]
) -> None:
    hostile = post(server, prompt="hello", json_schema=schema, max_new_tokens=8)

    assert hostile.status_code in (200, 400)
    assert post(server, prompt="hello", max_new_tokens=2).status_code == 200


class Answer(BaseModel):
    colour: Literal["red", "green"]
    count: Annotated[int, Field(ge=0, le=9)]


def test_openais_client_parses_answers_into_a_model(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model="mistral-7b", messages=MESSAGES, response_format=Answer, n=3, seed=4, max_tokens=LONG_ENOUGH
    )

    assert [type(choice.message.parsed) for choice in completion.choices] == [Answer] * 3
    assert {choice.finish_reason for choice in completion.choices} == {"stop"}


def test_openais_client_parses_a_stream_into_a_model(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="mistral-7b", messages=MESSAGES, response_format=Answer, seed=4, max_tokens=LONG_ENOUGH
    ) as stream:
        completion = stream.get_final_completion()

    assert isinstance(completion.choices[0].message.parsed, Answer)


def test_a_json_object_is_an_object(client: openai.OpenAI) -> None:
    """White space and quotes are made unlikely and the end likely, so that random weights come to an end."""
    bias = {str(i): -100 for i in range(3, len(TEXT.tokenizer)) if TEXT.piece(i) not in ("{", "}", b"{", b"}")}
    completion = client.chat.completions.create(
        model="mistral-7b", messages=MESSAGES, response_format={"type": "json_object"}, logit_bias=bias, temperature=0
    )

    assert completion.choices[0].finish_reason == "stop"
    assert json.loads(completion.choices[0].message.content or "") == {}


@each_kind
def test_structured_outputs_are_taken_by_chats_and_completions(
    client: openai.OpenAI, fields: dict[str, Any], fits: Any
) -> None:
    asked = {"json" if name == "json_schema" else name: value for name, value in fields.items()}
    extra = {"structured_outputs": asked}

    chat = client.chat.completions.create(
        model="mistral-7b", messages=MESSAGES, seed=1, max_tokens=LONG_ENOUGH, logprobs=True, extra_body=extra
    )
    completion = client.completions.create(
        model="mistral-7b", prompt="hello", seed=1, max_tokens=LONG_ENOUGH, extra_body=extra
    )

    assert fits(chat.choices[0].message.content)
    assert fits(completion.choices[0].text)


def test_a_wrong_schema_is_refused_with_its_field(client: openai.OpenAI) -> None:
    schema = {"name": "a", "schema": {"type": "string", "pattern": "(a"}}

    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="mistral-7b", messages=MESSAGES, response_format={"type": "json_schema", "json_schema": schema}
        )

    assert refused.value.param == "response_format"
    assert "response_format.json_schema.schema: " in refused.value.message
