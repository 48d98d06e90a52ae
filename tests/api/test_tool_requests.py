"""What a request says about tools: the fields and messages that are refused, each with a sentence, and ids."""

from __future__ import annotations

from typing import Any

import pytest

from model_server.api.openai.requests import parse_chat
from model_server.api.prompts import ModelLimits, ServedModel
from model_server.api.tools.messages import format_id
from model_server.api.v1 import predict
from model_server.errors import BadRequest
from tests.support.small_tokenizers import with_tools

TEXT = with_tools()
MODEL = ServedModel("m", TEXT, ModelLimits(max_model_len=4096, vocab_size=len(TEXT.tokenizer), eos_token_ids=(2,)))
USER = {"role": "user", "content": "hello"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f"} | fields}]


def called(*ids: str, **fields: Any) -> dict[str, Any]:
    functions = {"name": "f", "arguments": "{}"} | fields
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": one, "type": "function", "function": functions} for one in ids],
    }


def result(call_id: str | None = "a", **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "x"} | fields


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


FIELDS = [
    ({"tools": function(name="a b")}, "tools[0].function.name must be 1 to 64 letters, digits, underscores and"),
    ({"tools": function(name="a" * 65)}, "tools[0].function.name must be a string of 1 to 64 characters"),
    ({"tools": TOOLS * 2}, "tools[1].function.name must differ from the other tools' names."),
    ({"tools": function(name='"}]')}, "tools[0].function.name must be 1 to 64"),
    ({"tools": TOOLS * 129}, "tools must be a list of up to 128"),
    ({"tools": [{"type": "custom"}]}, 'tools[0].type must be "function"'),
    ({"tools": function(parameters={"type": "array"})}, 'tools[0].function.parameters.type must be "object".'),
    ({"tools": function(parameters=[])}, "tools[0].function.parameters must be an object"),
    ({"tools": function(parameters=nested(60))}, "tools[0].function.parameters is nested too deeply"),
    ({"tools": function(parameters={"properties": {"a": {"type": "strange"}}})}, "tools[0].function.parameters: "),
    ({"tools": function(strict=True, parameters={"properties": {"a": {"format": "odd", "type": "string"}}})},
     "tools[0].function.parameters: Unknown format: odd"),
    ({"tools": function(parameters={"properties": {"a": {"$ref": "#/none"}}})}, "tools[0].function.parameters: "),
    ({"tools": function(description="x" * 100_000)}, "messages is 1000"),
    ({"tools": TOOLS, "tool_choice": "any"}, 'tool_choice must be "none", "auto", "required" or {"type":'),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
     "tool_choice.function.name must be the name of one of the tools."),
    ({"tool_choice": "required"}, "tool_choice needs tools."),
    ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls must be true or false"),
]  # fmt: skip
MESSAGES = [
    ([USER, result()], "messages[1].tool_call_id must be the id of a call of the assistant's message before it"),
    ([USER, called("a"), result(None)], 'messages[2].tool_call_id must be given with the role "tool".'),
    ([USER, called("a"), result("b")], "messages[2].tool_call_id must be the id of a call"),
    ([USER, called("a"), result(), result()], "messages[3].tool_call_id must be the id of a call"),
    ([USER, called("a"), USER], "messages[1].tool_calls[0] has no result: add a message"),
    ([USER, called("a", "b"), result("b")], "messages[1].tool_calls[0] has no result: add a message"),
    ([USER, result(), called("a")], "messages[1].tool_call_id must be the id of a call"),
    ([USER, called("a", "a")], "messages[1].tool_calls[1].id must differ from the other calls' ids."),
    ([USER, called("a", name="a b"), result()], "messages[1].tool_calls[0].function.name must be 1 to 64"),
    ([USER | {"tool_call_id": "a"}], 'messages[0].tool_call_id must be left out without the role "tool".'),
    ([USER | {"tool_calls": called("a")["tool_calls"]}], 'messages[0].tool_calls must be left out without the role'),
    ([USER, called("a"), result(content=None)], "messages[2].content must be given."),
    ([{"role": "assistant"}], "messages[0].content must be given."),
    ([USER, called("a", arguments={"b": 1}), result()], "messages[1].tool_calls[0].function.arguments must be a"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "sentence"), FIELDS, ids=[sentence for _, sentence in FIELDS])
def test_wrong_tools_are_refused_with_a_sentence(body: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRequest) as of_chat:
        parse_chat({"model": "m", "messages": [USER]} | body, MODEL)
    with pytest.raises(BadRequest) as of_predict:
        predict.parse({"messages": [USER]} | body, MODEL)

    assert [str(refused.value).startswith(sentence) for refused in (of_chat, of_predict)] == [True, True], of_chat.value
    assert of_chat.value.field in {*body, "messages"}
    assert len(str(of_chat.value)) < 500


@pytest.mark.parametrize(("messages", "sentence"), MESSAGES, ids=[sentence for _, sentence in MESSAGES])
def test_calls_and_results_that_do_not_belong_together_are_refused(
    messages: list[dict[str, Any]], sentence: str
) -> None:
    for parse in (lambda body: parse_chat({"model": "m"} | body, MODEL), lambda body: predict.parse(body, MODEL)):
        with pytest.raises(BadRequest) as refused:
            parse({"messages": messages, "tools": TOOLS})
        assert str(refused.value).startswith(sentence)


def test_results_are_taken_in_any_order() -> None:
    messages = [USER, called("a", "b"), result("b"), result("a")]

    assert parse_chat({"model": "m", "messages": messages, "tools": TOOLS}, MODEL)


def test_an_id_of_another_server_always_becomes_the_same_one_of_mistrals_format() -> None:
    foreign = [format_id(f"call_{i}") for i in range(50)]

    assert foreign == [format_id(f"call_{i}") for i in range(50)]
    assert len(set(foreign)) == 50
    assert all(len(one) == 9 and one.isascii() and one.isalnum() for one in foreign)
    assert format_id("abcDEF123") == "abcDEF123"


def test_a_call_and_its_result_have_the_same_id_in_the_prompt() -> None:
    body = {"messages": [USER, called("call_1"), result("call_1")], "tools": TOOLS, "return_full_text": True}

    assert predict.parse(body, MODEL).prompts[0].count(format_id("call_1")) == 2


def test_tools_are_in_the_prompt_unless_none_may_be_called() -> None:
    def prompt(**fields: Any) -> str:
        return predict.parse({"messages": [USER], "return_full_text": True, "tools": TOOLS} | fields, MODEL).prompts[0]

    assert "[AVAILABLE_TOOLS]" in prompt()
    assert "[AVAILABLE_TOOLS]" in prompt(tool_choice="required")
    assert "[AVAILABLE_TOOLS]" not in prompt(tool_choice="none")


@pytest.mark.parametrize("field", ["tools", "tool_choice", "parallel_tool_calls"])
def test_a_prompt_has_no_tools(field: str) -> None:
    value = {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True}[field]

    with pytest.raises(BadRequest, match=f"{field} needs messages, not a prompt."):
        predict.parse({"prompt": "hello", field: value}, MODEL)


def test_the_end_of_the_text_is_the_tools_own() -> None:
    with pytest.raises(BadRequest, match="eos_token_id does not work with tools"):
        predict.parse({"messages": [USER], "tools": TOOLS, "eos_token_id": 5}, MODEL)


def test_a_grammar_other_than_a_schema_does_not_work_with_tools() -> None:
    with pytest.raises(BadRequest, match="regex does not work with tools"):
        predict.parse({"messages": [USER], "tools": TOOLS, "regex": "a"}, MODEL)
