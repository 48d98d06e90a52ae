"""A stream ends before the first stop string, wherever its tokens divide it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.small_tokenizers import byte_fallback, byte_level, streamed

both = pytest.mark.parametrize("text", [byte_fallback(), byte_level()], ids=["byte_fallback", "byte_level"])
few_letters = st.text("ab o🎉", min_size=1, max_size=5)


def cut_at_first_stop(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, bool]:
    """The plain way: after each piece, look for every stop string in all there is."""
    so_far = ""
    for piece in pieces:
        so_far += piece
        if found := [start for s in stop if (start := so_far.find(s)) >= 0]:
            return so_far[: min(found)], True
    return so_far, False


@both
@settings(max_examples=200, deadline=None)
@given(lines=st.lists(few_letters, max_size=12), stop=st.lists(few_letters, min_size=1, max_size=4).map(tuple))
def test_text_ends_before_the_first_stop_string(text, lines, stop):
    ids = [i for line in lines for i in text.tokenizer(line, add_special_tokens=False).input_ids]
    stream = text.stream(stop)
    answer = "".join(map(stream.push, ids)) + stream.flush()
    assert (answer, stream.stopped) == cut_at_first_stop(streamed(text, ids), stop)


@settings(max_examples=150, deadline=None)
@given(line=st.text("ab", max_size=40), stop=st.text("ab", min_size=1, max_size=8))
def test_stop_string_that_repeats_itself_is_found_across_tokens(line, stop):
    text = byte_fallback()
    ids = text.tokenizer.convert_tokens_to_ids(list(line))
    assert "".join(streamed(text, ids, (stop,))) == line.split(stop)[0]


def test_only_a_possible_beginning_of_a_stop_string_is_held_back():
    text = byte_fallback()
    stream = text.stream(("old",))
    assert [stream.push(text.tokenizer.convert_tokens_to_ids(c)) for c in "hollo"] == ["h", "", "", "oll", ""]
    assert (stream.flush(), stream.stopped) == ("o", False)


def test_stopped_stream_gives_nothing_more():
    text = byte_fallback()
    stream = text.stream(("l",))
    given = [stream.push(text.tokenizer.convert_tokens_to_ids(c)) for c in "hello"]
    assert (given, stream.stopped, stream.flush()) == (["h", "e", "", "", ""], True, "")


def test_stop_string_completed_by_the_end_of_a_byte_run_stops():
    text = byte_fallback()
    ids = [text.tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "🚀".encode()]
    stream = text.stream(("🚀",))
    assert ("".join(map(stream.push, ids)), stream.flush(), stream.stopped) == ("", "", True)
