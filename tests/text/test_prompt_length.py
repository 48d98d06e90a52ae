"""The longest prompt, in characters, that a number of tokens can hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model_server.text.tokenizer import UNBOUNDED, Text
from tests.support.small_tokenizers import CORPUS, byte_fallback, byte_level

both = pytest.mark.parametrize("text", [byte_fallback(), byte_level()], ids=["byte_fallback", "byte_level"])


@both
@settings(max_examples=150, deadline=None)
@given(prompt=st.one_of(st.text(max_size=50), st.text(" \n\tthe日🎉", max_size=80), st.sampled_from(CORPUS)))
def test_no_prompt_is_longer_than_its_tokens_allow(text, prompt):
    assert len(prompt) <= text.max_prompt_chars(len(text.encode(prompt)))


@both
def test_length_bound_is_worth_asking(text):
    assert text.max_prompt_chars(4096) < 4096 * 64


def shrinking(**parts) -> Text:
    backend = Tokenizer.from_str(byte_fallback().tokenizer.backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(backend, name, part)
    return Text(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Replace(Regex(" {2,}"), " ")},
        {"normalizer": normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])},
        {"pre_tokenizer": pre_tokenizers.WhitespaceSplit()},
        {"pre_tokenizer": pre_tokenizers.Split(" ", "removed")},
        {"model": models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True)},
        {"model": models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")},
    ],
    ids=str,
)
def test_tokenizer_that_may_swallow_text_has_no_length_bound(parts):
    assert shrinking(**parts).max_prompt_chars(1) == UNBOUNDED


def test_added_token_that_swallows_white_space_leaves_no_length_bound():
    text = shrinking()
    text.tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert text.max_prompt_chars(1) == UNBOUNDED
