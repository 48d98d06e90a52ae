"""Prompt and completion as one text: the pieces joined are what Transformers' `TextStreamer` prints."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TextStreamer

from model_server.text.tokenizer import Text
from tests.support.small_tokenizers import byte_fallback, byte_level

TEXTS = {"byte fallback": byte_fallback(), "byte level": byte_level()}


class Printed(TextStreamer):
    """Keeps what it would print."""

    def __init__(self, text: Text, **options: bool) -> None:
        super().__init__(text.tokenizer, **options)
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)


def printed(text: Text, prompt_ids: list[int], ids: list[int], **options: bool) -> list[str]:
    streamer = Printed(text, **options)
    for put in (prompt_ids, *([token_id] for token_id in ids)):
        streamer.put(np.array(put))
    streamer.end()
    return streamer.pieces


def streamed(text: Text, prompt_ids: list[int], ids: list[int], **options: bool) -> list[str]:
    stream = text.full_text_stream(prompt_ids, **options)
    return [stream.prompt, *map(stream.push, ids), stream.flush()]


ids = st.integers(0, 270)
# Bytes that matter: the end of a line, a space, and the parts of a CJK character.
bytes_that_matter = st.sampled_from([3 + byte for byte in (0x0A, 0x20, 0xE4, 0xB8, 0xAD, 0x41)])


@pytest.mark.parametrize("name", TEXTS)
@given(prompt=st.lists(ids | bytes_that_matter, min_size=1, max_size=8), completion=st.lists(ids | bytes_that_matter))
def test_pieces_are_those_of_transformers_streamer(name: str, prompt: list[int], completion: list[int]) -> None:
    assert streamed(TEXTS[name], prompt, completion) == printed(TEXTS[name], prompt, completion)


@pytest.mark.parametrize("name", TEXTS)
@given(prompt=st.lists(ids | bytes_that_matter, min_size=1, max_size=8), completion=st.lists(ids | bytes_that_matter))
def test_special_tokens_are_skipped_on_request(name: str, prompt: list[int], completion: list[int]) -> None:
    pieces = streamed(TEXTS[name], prompt, completion, skip_special_tokens=True)
    assert pieces == printed(TEXTS[name], prompt, completion, skip_special_tokens=True)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("line", ["hello world 日本語 e\u0301 🎉", "two  spaces\nand a line", "ends in a line\n"])
def test_pieces_joined_are_the_text(name: str, line: str) -> None:
    text = TEXTS[name]
    prompt_ids, ids = text.encode("The meaning"), text.encode(line)[1:]
    assert "".join(streamed(text, prompt_ids, ids)) == "".join(printed(text, prompt_ids, ids))


def test_without_the_prompt_only_the_completion_is_returned() -> None:
    text = byte_level()
    prompt_ids, ids = text.encode("The meaning of"), text.encode(" life is kind")[1:]
    assert "".join(streamed(text, prompt_ids, ids, with_prompt=False)) == " life is kind"


@pytest.mark.parametrize("stop", ["kind", "f life", "o be\nk"])
def test_a_stop_string_ends_the_completion_and_is_part_of_it(stop: str) -> None:
    text = byte_level()
    stream = text.full_text_stream(text.encode("kind: The meaning o"), (stop,))
    told = ""
    for token_id in text.encode("f life is to be\nkind to all")[1:]:
        assert not stream.stopped
        told += stream.push(token_id)
        if stream.stopped:
            break
    assert stream.stopped
    assert text.decode(stream.ids).find(stop) + len(stop) > len(text.decode(stream.ids[:-1]))
