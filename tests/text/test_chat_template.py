"""Chats are rendered and encoded by the model's own template."""

from __future__ import annotations

import pytest

from model_server.errors import BadRequest
from tests.support.small_tokenizers import byte_fallback, byte_level

CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "日本語 🎉?"},
]


def test_chat_is_rendered_by_the_models_template():
    assert byte_fallback().render_chat(CHAT) == "<s>[INST] Hello [/INST]Hi!</s>[INST] 日本語 🎉? [/INST]"


def test_chat_is_encoded_as_transformers_does_with_one_bos():
    text = byte_fallback()
    prompt, ids = text.encode_chat(CHAT)
    assert ids == text.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert (prompt, ids.count(1)) == (text.render_chat(CHAT), 1)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one"),
        ([CHAT[1]], "roles must alternate"),
        ([CHAT[0], CHAT[0]], "roles must alternate"),
        ([{"role": "user"}], "refuses them"),
        ([{"role": "user", "content": 5}], "cannot render"),
        ([{}], "refuses them"),
    ],
)
def test_messages_that_the_template_refuses_are_a_bad_request(messages, reason):
    with pytest.raises(BadRequest, match=reason) as caught:
        byte_fallback().render_chat(messages)
    assert caught.value.field == "messages"


def test_chat_without_a_template_is_a_bad_request():
    with pytest.raises(BadRequest, match="no chat template"):
        byte_level().render_chat(CHAT)


def test_half_a_surrogate_pair_in_a_message_is_refused_by_name():
    with pytest.raises(BadRequest, match="messages must be valid Unicode"):
        byte_fallback().encode_chat([{"role": "user", "content": "\ud83d"}])
