"""A streamed answer is the whole decode of its tokens, whichever tokens end a piece."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from model_server.text.tokenizer import BYTE_OF_CHAR, Text
from tests.support.small_tokenizers import CORPUS, byte_fallback, byte_level, streamed

both = pytest.mark.parametrize("text", [byte_fallback(), byte_level()], ids=["byte_fallback", "byte_level"])


@st.composite
def answers(draw, text: Text) -> list[int]:
    """Tokens of real text, torn and mixed with bytes, special tokens and ids that no token has."""
    vocab = text.tokenizer.get_vocab()
    raw = sorted(i for token, i in vocab.items() if token.startswith("<0x") or len(token) == 1)
    real = st.sampled_from(CORPUS).map(lambda line: text.tokenizer(line, add_special_tokens=False).input_ids)
    some = real.flatmap(lambda ids: st.tuples(st.integers(0, len(ids)), st.integers(0, len(ids)), st.just(ids)))
    parts = st.one_of(
        some.map(lambda cut: cut[2][min(cut[:2]) : max(cut[:2])]),
        st.lists(st.integers(0, len(vocab) + 3), max_size=6),
        st.lists(st.sampled_from(raw), max_size=6),
        st.text(max_size=4).map(lambda s: text.tokenizer(s, add_special_tokens=False).input_ids),
    )
    return [i for part in draw(st.lists(parts, max_size=6)) for i in part]


def whole(text: Text, ids: list[int]) -> str:
    """What Transformers makes of an answer, behind a letter that saves its first space from stripping."""
    letter = text.tokenizer.convert_tokens_to_ids("o")
    decoded = text.tokenizer.decode([letter, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return decoded.removeprefix("o")


@both
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_joined_are_the_whole_decode(text, data):
    ids = data.draw(answers(text))
    pieces = streamed(text, ids)
    assert "".join(pieces) == whole(text, ids) == text.decode(ids)


@both
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_piece_is_in_its_place_of_the_whole(text, data):
    """So no piece can hold a U+FFFD that the whole does not, nor half of a character."""
    ids = data.draw(answers(text))
    stream, expected, so_far = text.stream(), whole(text, ids), ""
    for token_id in ids:
        so_far += stream.push(token_id)
        assert expected.startswith(so_far)


@both
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_only_the_space_stripped_from_the_start_differs_from_plain_decode(text, data):
    ids = data.draw(answers(text))
    plain = text.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text.decode(ids) in (plain, " " + plain)


@both
@pytest.mark.parametrize("line", [*CORPUS, "🏳️‍🌈", "e\u0301", "\u202eשלום", "नमस्ते", "a\x00b", "\ufffd"])
def test_real_text_comes_back_whole(text, line):
    ids = text.tokenizer(line, add_special_tokens=False).input_ids
    space_put_in_front = " " if text is byte_fallback() else ""
    assert "".join(streamed(text, ids)) == space_put_in_front + line


def test_first_space_is_kept_so_that_prompt_and_answer_read_right():
    text = byte_fallback()
    ids = text.tokenizer("The meaning", add_special_tokens=False).input_ids
    assert text.decode(ids) == " The meaning"


def test_special_tokens_are_skipped_and_do_not_end_a_run_of_bytes():
    text = byte_fallback()
    emoji = [text.tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "🚀".encode()]
    eos = text.tokenizer.eos_token_id
    assert text.decode([*emoji[:2], eos, *emoji[2:], eos]) == "🚀"


def test_character_torn_over_tokens_arrives_in_one_piece():
    text = byte_level()
    tokens = [next(c for c, b in BYTE_OF_CHAR.items() if b == byte) for byte in "🚀".encode()]
    assert streamed(text, text.tokenizer.convert_tokens_to_ids(tokens)) == ["", "", "", "🚀", ""]


@both
def test_endless_broken_bytes_are_not_held_back(text):
    raw = next(c for c, b in BYTE_OF_CHAR.items() if b == 0xFF) if text is byte_level() else "<0xFF>"
    stream = text.stream()
    assert [stream.push(text.tokenizer.convert_tokens_to_ids(raw)) for _ in range(50)] == ["\ufffd"] * 50


def test_byte_alphabet_is_the_tokenizers_own():
    assert set(BYTE_OF_CHAR) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_OF_CHAR.values()) == list(range(256))
