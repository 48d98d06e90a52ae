"""Tool calls in an answer: the detokenizer marks where they begin, and the parser splits content and calls."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_server.text.tool_calls import MARK, ToolCallDelta, ToolCallDetokenizer, ToolCallParser, new_id
from tests.support.small_tokenizers import with_tools

CALLS = ' [{"name": "f", "arguments": {"a": "}\\\\\\"]", "b": [1, {}]}}, {"name": "g-1_", "arguments": {}}]'
TEXT = with_tools()
TOOL_CALLS_ID = TEXT.tool_calls_id
assert TOOL_CALLS_ID is not None


def parse(*pieces: str) -> tuple[ToolCallParser, list[str | ToolCallDelta]]:
    counter = itertools.count()
    parser = ToolCallParser(lambda: f"id{next(counter)}")
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return parser, deltas + parser.finish()


def called(parser: ToolCallParser) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in parser.calls]


def test_an_answer_is_content_and_calls() -> None:
    parser, _ = parse("Let me look." + MARK + CALLS)

    assert parser.content == "Let me look."
    assert called(parser) == [("f", '{"a": "}\\\\\\"]", "b": [1, {}]}'), ("g-1_", "{}")]


def test_the_space_before_the_calls_may_be_missing() -> None:
    assert called(parse(MARK + CALLS.lstrip())[0]) == called(parse(MARK + CALLS)[0])


@given(st.lists(st.integers(0, len(CALLS) + 3), max_size=20).map(sorted))
def test_pieces_add_up_to_the_whole_answer(cuts: list[int]) -> None:
    text = "Hi" + MARK + CALLS
    parser, deltas = parse(*(text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])))

    assert (parser.content, called(parser)) == ("Hi", called(parse(text)[0]))
    assert "".join(delta for delta in deltas if isinstance(delta, str)) == "Hi"
    for index, call in enumerate(parser.calls):
        first, *more = [delta for delta in deltas if isinstance(delta, ToolCallDelta) and delta.index == index]
        assert (first.id, first.name, first.arguments) == (call.id, call.name, "")
        assert "".join(delta.arguments for delta in more) == call.arguments


@pytest.mark.parametrize("length", range(len(CALLS)))
def test_an_answer_that_is_cut_anywhere_has_the_calls_up_to_there(length: int) -> None:
    parser, _ = parse(MARK + CALLS[:length])

    whole = called(parse(MARK + CALLS)[0])
    for (name, arguments), (whole_name, whole_arguments) in zip(called(parser), whole, strict=False):
        assert name == whole_name
        assert whole_arguments.startswith(arguments)
    assert parser.content in CALLS[:length]


@pytest.mark.parametrize(
    "text", ["no calls", " {}", ' [{"name": "f o", "arguments": {}}]', ' [{"arguments": {}}]', " []"]
)
def test_what_is_no_call_is_content(text: str) -> None:
    parser, deltas = parse("Hi " + MARK + text)

    assert (parser.content, parser.calls) == ("Hi " + text, [])
    assert deltas == ["Hi ", text]


@given(st.text())
def test_nothing_behind_the_mark_is_anything_worse_than_content(text: str) -> None:
    parse(MARK + text)


def test_ids_are_nine_letters_and_digits_and_differ() -> None:
    ids = {new_id() for _ in range(100)}

    assert len(ids) == 100
    assert all(len(one) == 9 and one.isalnum() and one.isascii() for one in ids)


def detokenizer(stop: tuple[str, ...] = ()) -> ToolCallDetokenizer:
    return ToolCallDetokenizer(TEXT.stream(stop), TEXT.stream(), TOOL_CALLS_ID)


def run(stream: ToolCallDetokenizer, ids: list[int]) -> str:
    return "".join(map(stream.push, ids)) + stream.flush()


def tokens(text: str) -> list[int]:
    return TEXT.encode(text)[1:]


def test_the_text_has_a_mark_at_the_token_of_tool_calls_and_only_there() -> None:
    text = run(detokenizer(), [*tokens("[TOOL_CALLS]x")[1:], TOOL_CALLS_ID, *tokens(CALLS.strip())])

    assert text.count(MARK) == 1
    assert text.endswith(MARK + CALLS)


def test_a_stop_string_ends_the_content_and_not_the_calls() -> None:
    stopped, calling = detokenizer(("life",)), detokenizer(("f", "}"))

    assert run(stopped, [*tokens("The meaning of life"), TOOL_CALLS_ID]) == " The meaning of "
    assert stopped.stopped
    assert run(calling, [TOOL_CALLS_ID, *tokens(CALLS.strip())]) == MARK + CALLS
    assert not calling.stopped


def test_the_beginning_of_a_stop_string_is_content_when_the_calls_begin() -> None:
    stream = detokenizer(("hello world",))

    text = run(stream, [*tokens("hello"), TOOL_CALLS_ID, *tokens("[]")])

    assert text == f" hello{MARK} []"
    assert json.dumps(text)
