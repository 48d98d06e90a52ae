"""Prompts are encoded as Transformers encodes them; single tokens have a text; a broken tokenizer stops the start."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from model_server.errors import BadRequest, StartupError
from model_server.text.tokenizer import Text
from tests.support.small_tokenizers import CORPUS, byte_fallback, byte_level

both = pytest.mark.parametrize("text", [byte_fallback(), byte_level()], ids=["byte_fallback", "byte_level"])


@both
@settings(max_examples=100, deadline=None)
@given(prompt=st.text(max_size=30))
def test_encode_is_what_the_tokenizer_does(text, prompt):
    assert text.encode(prompt) == text.tokenizer(prompt).input_ids


@both
def test_half_a_surrogate_pair_is_refused_by_name(text):
    with pytest.raises(BadRequest, match="prompt must be valid Unicode") as caught:
        text.encode("\ud83d")
    assert caught.value.field == "prompt"


def test_truncation_saved_with_a_tokenizer_does_not_cut_prompts():
    backend = Tokenizer.from_str(byte_level().tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    assert len(Text(PreTrainedTokenizerFast(tokenizer_object=backend)).encode(CORPUS[0])) > 4


@both
def test_token_texts_of_a_plain_sentence_spell_it(text):
    ids = text.tokenizer(CORPUS[0], add_special_tokens=False).input_ids
    assert "".join(map(text.token_text, ids)).strip() == CORPUS[0]


@both
def test_special_token_reads_as_itself_and_a_missing_one_as_nothing(text):
    assert text.token_text(text.tokenizer.eos_token_id) == "</s>"
    assert text.token_text(len(text.tokenizer) + 5) == ""


def test_bytes_of_torn_characters_are_shown_and_given_as_bytes():
    text = byte_fallback()
    first = text.tokenizer.convert_tokens_to_ids("<0xF0>")
    assert (text.token_text(first), text.token_bytes(first)) == ("bytes:\\xf0", b"\xf0")


def test_token_text_keeps_its_space():
    text = byte_fallback()
    assert text.token_text(text.tokenizer.convert_tokens_to_ids("▁the")) == " the"


@both
def test_saved_tokenizer_loads_and_reads_the_same(text, tmp_path):
    text.tokenizer.save_pretrained(tmp_path)
    loaded = Text.load(tmp_path)
    assert loaded.encode(CORPUS[2]) == text.encode(CORPUS[2])
    assert loaded.decode(loaded.encode(CORPUS[2])).strip() == CORPUS[2]


@pytest.mark.parametrize("content", [None, "not json", "{}"])
def test_missing_or_broken_tokenizer_stops_the_start_with_a_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(StartupError, match=r"tokenizer in .* cannot be read: ") as caught:
        Text.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_that_lies_beside_a_tokenizer_never_runs(tmp_path):
    (tmp_path / "code.py").write_text("raise SystemExit('ran')\nclass T: ...\n")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "code.T"]}}')
    with pytest.raises(StartupError):
        Text.load(tmp_path)
