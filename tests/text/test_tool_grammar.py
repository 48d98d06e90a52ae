"""The grammar of tool calls: what it allows behind [TOOL_CALLS], and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from model_server.errors import BadRequest
from model_server.text.grammar import GrammarCompiler, GrammarSpec
from model_server.text.tool_grammar import NO_ARGUMENTS, ToolSignature, tool_call_grammar
from tests.support.small_tokenizers import with_tools

TEXT = with_tools()
SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/C"}, "n": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"C": {"enum": ["Rome"]}},
}
TOOLS = [ToolSignature("weather", SCHEMA), ToolSignature("roll", NO_ARGUMENTS)]
WEATHER = '{"name": "weather", "arguments": {"city": "Rome", "n": 1}}'
ROLL = '{"name": "roll", "arguments": {}}'


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TEXT.tokenizer_json, vocab_size=len(TEXT.tokenizer), eos_token_ids=(2,))


def allows(compiler: GrammarCompiler, grammar: GrammarSpec, ids: list[int]) -> bool:
    """Return whether these tokens are allowed, one after the other, and then the end."""
    matcher = compiler.compile(grammar)._matcher
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def tokens(text: str) -> list[int]:
    return TEXT.encode(text)[1:]


@pytest.mark.parametrize("text", [f"[{WEATHER}]", f"[{ROLL}]", f"[{ROLL}, {WEATHER}]"])
def test_calls_of_the_tools_are_allowed(compiler: GrammarCompiler, text: str) -> None:
    assert allows(compiler, tool_call_grammar(TOOLS, parallel=True), tokens(text))


@pytest.mark.parametrize(
    "text",
    ["[]", WEATHER, '[{"name": "other", "arguments": {}}]', '[{"name": "weather", "arguments": {}}]',
     '[{"name": "roll", "arguments": {"a": 1}}]', f"[{ROLL},{ROLL}]", f"[{ROLL}] and more"],
)  # fmt: skip
def test_nothing_else_is_allowed(compiler: GrammarCompiler, text: str) -> None:
    assert not allows(compiler, tool_call_grammar(TOOLS, parallel=True), tokens(text))


@pytest.mark.parametrize(
    ("more", "allowed"), [({}, False), ({"additionalProperties": True}, True), ({"minProperties": 1}, True)]
)
def test_an_unknown_argument_is_allowed_only_where_the_schema_says_more_than_its_properties(
    compiler: GrammarCompiler, more: dict[str, Any], allowed: bool
) -> None:
    schema = {"properties": {"city": {"type": "string"}}, "required": ["city"]} | more
    grammar = tool_call_grammar([ToolSignature("f", schema)], parallel=False)
    text = '[{"name": "f", "arguments": {"city": "Rome", "b": 1}}]'

    assert allows(compiler, grammar, tokens(text)) == allowed


def test_one_call_is_the_most_without_parallel_calls(compiler: GrammarCompiler) -> None:
    grammar = tool_call_grammar(TOOLS, parallel=False)

    assert allows(compiler, grammar, tokens(f"[{ROLL}]"))
    assert not allows(compiler, grammar, tokens(f"[{ROLL}, {ROLL}]"))


def test_a_required_call_begins_with_its_token(compiler: GrammarCompiler) -> None:
    assert TEXT.tool_calls_id is not None
    grammar = tool_call_grammar(TOOLS, parallel=True, tool_calls_id=TEXT.tool_calls_id)

    assert allows(compiler, grammar, [TEXT.tool_calls_id, *tokens(f"[{ROLL}]")])
    assert not allows(compiler, grammar, tokens(f"[{ROLL}]"))


def test_an_answer_may_stand_in_place_of_the_calls(compiler: GrammarCompiler) -> None:
    assert TEXT.tool_calls_id is not None
    answer = GrammarSpec.json_schema({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]})
    grammar = tool_call_grammar(TOOLS, parallel=True, tool_calls_id=TEXT.tool_calls_id, answer=answer)

    assert allows(compiler, grammar, [TEXT.tool_calls_id, *tokens(f"[{ROLL}]")])
    assert not allows(compiler, grammar, tokens(f"[{ROLL}]"))


@pytest.mark.parametrize("strict", [False, True])
def test_a_keyword_that_cannot_be_enforced_is_refused_only_if_strict(compiler: GrammarCompiler, strict: bool) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string", "format": "no-such-format"}}}
    grammar = tool_call_grammar([ToolSignature("f", schema, strict)], parallel=True)

    if strict:
        with pytest.raises(BadRequest):
            compiler.compile(grammar)
    else:
        assert allows(compiler, grammar, tokens('[{"name": "f", "arguments": {"a": "b"}}]'))


def test_as_many_tools_as_a_request_may_have_are_compiled(compiler: GrammarCompiler) -> None:
    tools = [ToolSignature(f"tool_{i}", SCHEMA) for i in range(128)]

    assert allows(
        compiler, tool_call_grammar(tools, parallel=True), tokens(f"[{WEATHER.replace('weather', 'tool_127')}]")
    )
