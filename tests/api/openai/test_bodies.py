"""What OpenAI's API takes as a body, and how it refuses the rest."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_server.api.openai.requests import parse_chat, parse_completion
from model_server.errors import BadRequest, UnknownModel
from tests.support.openai_api import MESSAGES, NAME, SERVER, VOCAB_SIZE

SCHEMA = {"name": "a", "schema": {"type": "object"}}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"temperature": "0.5"}, "temperature must be a number from 0 to 2, not a string."),
        ({"temperature": 2.1}, "temperature must be a number from 0 to 2, not 2.1."),
        ({"n": True}, "n must be an integer from 1 to 128, not true."),
        ({"logprobs": 6}, "logprobs must be an integer from 0 to 5, not 6."),
        ({"prompt": []}, "prompt must be a string, a list of strings"),
        ({"prompt": [[]]}, "prompt must be a string, a list of strings, a list of token ids"),
        ({"prompt": [1, "a"]}, "prompt must be a string, a list of strings, a list of token ids"),
        ({"prompt": [1, VOCAB_SIZE]}, f"prompt must hold token ids from 0 to {VOCAB_SIZE - 1}."),
        ({"prompt": [1] * 64}, "prompt is 64 tokens; the maximum context length is 64"),
        ({"prompt": "\ud800"}, "prompt must be valid Unicode"),
        ({"stop": ["a"] * 17}, "stop must be a string of 1 to 256 characters or a list of up to 16 strings"),
        ({"stop": ""}, "stop must be a string of 1 to 256 characters or a list of up to 16 strings"),
        ({"logit_bias": {"x": 1}}, "logit_bias must have token ids"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5 must be a number from -100 to 100, not 101."),
        ({"n": 2, "best_of": 3}, "best_of must be n (2)"),
        ({"n": 100, "prompt": ["a", "b"]}, "n times the prompts must be at most 128, not 200."),
        # Counted before the prompts are read.
        ({"n": 65, "prompt": ["\ud800", "a"]}, "n times the prompts must be at most 128, not 130."),
        ({"max_tokens": 0}, "max_tokens must be at least 1 without echo."),
        ({"suffix": "end"}, "suffix is not supported here"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream to be true."),
        ({"top_k": 5}, "top_k is not a field of this request."),
        ({"model": None}, "model must be given."),
    ],
    ids=str,
)
def test_a_wrong_completion_is_refused_with_its_fields_name(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_completion({"model": NAME, "prompt": "a"} | wrong, SERVER)
    assert str(refused.value).startswith(sentence)
    assert refused.value.field == next(reversed(wrong)) or refused.value.field in wrong


def test_too_many_biases_are_refused_with_their_number() -> None:
    bias = {str(token_id): 1 for token_id in range(1025)}

    with pytest.raises(BadRequest, match=r"^logit_bias must be an object of up to 1024 names, not one of 1025\.$"):
        parse_completion({"model": NAME, "prompt": "a", "logit_bias": bias}, SERVER)


def test_more_messages_than_tokens_fit_are_refused_before_they_are_tokenized() -> None:
    messages = [{"role": "user", "content": ""}] * 65

    with pytest.raises(BadRequest, match=r"^messages must be a list of 1 to 64 messages, not a list of 65\.$"):
        parse_chat({"model": NAME, "messages": messages}, SERVER)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"messages": []}, "messages must"),
        ({"messages": [{"role": "nurse", "content": "a"}]}, "messages[0].role must be"),
        ({"messages": [{"role": "user"}]}, "messages[0].content must be given."),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be a string or a list of"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0].type must be "),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name is not supported"),
        ({"tools": [{"type": "function"}]}, "tools[0].function must be given."),
        ({"parallel_tool_calls": 0}, "parallel_tool_calls must be true or false"),
        ({"response_format": {"type": "xml"}}, 'response_format.type must be "text", "json_object" or "json_schema"'),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema must be given with"),
        ({"response_format": {"type": "text", "json_schema": SCHEMA}}, "response_format.json_schema must be left out"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
         "response_format.json_schema.schema must be given."),
        ({"response_format": {"type": "json_schema", "json_schema": SCHEMA | {"schema": {"not": {}}}}},
         "response_format.json_schema.schema: Unimplemented keys"),
        ({"structured_outputs": {}}, "structured_outputs must have one of json, regex, choice, grammar."),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json must be valid JSON"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json must be a JSON schema: an object."),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex: "),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs.grammar: "),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}},
         "structured_outputs.regex and structured_outputs.choice each set the form of the answer"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
         "response_format and structured_outputs.regex each set"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs to be true."),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens is the old name"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_chat_is_refused_with_its_fields_name(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_chat({"model": NAME, "messages": MESSAGES} | wrong, SERVER)
    assert str(refused.value).startswith(sentence)
    assert refused.value.field in {*wrong, "messages"}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": SCHEMA | {"strict": True, "description": "b"}}},
        {"structured_outputs": {"json": {"type": "object"}}},
        {"structured_outputs": {"json": '{"type": "object"}'}},
        {"structured_outputs": {"regex": "a+"}},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"structured_outputs": {"grammar": 'start: "a"'}},
        {"structured_outputs": {"regex": "a+"}, "response_format": {"type": "text"}},
    ],
    ids=str,
)
def test_every_answer_of_a_call_with_a_grammar_has_its_own_matcher(fields: dict[str, Any]) -> None:
    chat = parse_chat({"model": NAME, "messages": MESSAGES, "n": 2} | fields, SERVER)
    completion = parse_completion({"model": NAME, "prompt": ["a", "b"]} | fields, SERVER)

    for call in (chat, completion):
        first, second = (request.matcher for request in call.requests)
        assert first is not None
        assert second is not None
        assert first is not second


def test_fields_that_ask_for_nothing_are_taken() -> None:
    harmless = {"tools": [], "response_format": {"type": "text"}, "user": "me", "seed": None, "store": False}
    answered = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [*MESSAGES, answered, *MESSAGES]
    assert len(parse_chat({"model": NAME, "messages": messages} | harmless, SERVER).requests) == 1


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["model", "prompt", "messages", "n", "stop", "logit_bias", "logprobs", "max_tokens", "stream_options", "tools"]
FIELDS += ["response_format", "structured_outputs"]


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), anything) | anything)
def test_no_body_is_anything_worse_than_refused(body: Any) -> None:
    for parse, valid in ((parse_completion, {"prompt": "a"}), (parse_chat, {"messages": MESSAGES})):
        with contextlib.suppress(BadRequest, UnknownModel):
            parse({"model": NAME} | valid | body if isinstance(body, dict) else body, SERVER)
