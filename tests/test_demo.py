"""The demo model: a real one's files, sensible answers to prompts and chats, made once."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from demo import make as demo_make
from demo.corpus import entries
from model_server.errors import BadRequest
from model_server.text import Text

pytestmark = pytest.mark.timeout(300)  # the first run makes the model


@pytest.fixture(scope="module")
def model_dir() -> Path:
    """The one that `make run` serves, in the cache both share."""
    return demo_make.make()


@pytest.fixture(scope="module")
def text(model_dir) -> Text:
    return Text.load(model_dir)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(model_dir, request):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=request.param)


def answer(model, text: Text, prompt_ids: list[int], **sampling) -> str:
    """Return the answer, which must end by itself."""
    inputs = torch.tensor([prompt_ids])
    output = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=200, pad_token_id=2, **sampling
    )
    ids = output[0, len(prompt_ids) :].tolist()
    assert ids[-1] == text.tokenizer.eos_token_id
    return text.decode(ids)


@pytest.mark.parametrize("prompt", ["What is the meaning of life?", "What's the meaning of life?"])
def test_prompt_of_the_readme_gets_a_readable_answer(model, text, prompt):
    assert answer(model, text, text.encode(prompt)).startswith(" The meaning of life is a question that every")


@pytest.mark.parametrize("seed", range(3))
def test_answer_holds_under_the_servers_default_sampling(model, text, seed):
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": 0.1, "top_p": 0.75, "top_k": 40}
    assert answer(model, text, text.encode("What is the meaning of life?"), **sampling).endswith("it is 42.")


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is Mistral 7B?", "seven billion parameters"),
        ("What is KServe?", "Kubernetes"),
        ("What does scale to zero mean?", "nobody calls"),
        ("How do I stream the answer?", '"stream": true'),
        ("What is a token?", "piece of text"),
        ("Who made you?", "Your own computer"),
        ("Why is the sky blue?", "blue light"),
        ("Count to ten", "nine, ten"),
        ("Show me an emoji", "😀 🎉 🚀"),
    ],
)
def test_question_is_answered_as_a_raw_prompt_and_as_a_chat(model, text, question, expected):
    assert expected in answer(model, text, text.encode(question))
    assert expected in answer(model, text, text.encode_chat([{"role": "user", "content": question}])[1])


def test_every_plain_question_of_the_pages_has_its_own_answer(model, text):
    asked = {entry.questions[0]: entry.answer for entry in entries()}
    wrong = [q for q, expected in asked.items() if answer(model, text, text.encode(q)) != f" {expected}"]
    assert len(wrong) <= len(asked) // 20, wrong


def test_files_are_those_of_a_mistral(model_dir):
    assert sorted(path.name for path in model_dir.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((model_dir / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert (config["max_position_embeddings"] >= 4096, config["sliding_window"]) == (True, None)


def test_model_that_is_there_is_not_made_again(model_dir):
    began_s = time.monotonic()
    assert demo_make.make() == model_dir
    assert time.monotonic() - began_s < 1


def test_interrupted_making_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_make, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_make.make(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_chat_template_folds_the_system_message_into_the_first_turn(text):
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
    assert text.render_chat([system, user]) == "<s>[INST] Be kind.\n\nHi [/INST]"
    assert text.render_chat([user, {"role": "assistant", "content": "Ho"}, user]) == (
        "<s>[INST] Hi [/INST] Ho</s>[INST] Hi [/INST]"
    )


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["system"], ["user", "system"], ["tool"]])
def test_chat_template_refuses_roles_that_do_not_alternate(text, roles):
    with pytest.raises(BadRequest, match="refuses"):
        text.render_chat([{"role": role, "content": "Hi"} for role in roles])


def test_every_heading_of_the_faq_is_a_question_it_knows():
    page = demo_make.PAGES[0].read_text(encoding="utf-8")
    known = {question for entry in entries() for question in entry.questions}
    assert set(re.findall(r"^## (.+)$", page, re.MULTILINE)) <= known
    assert len(entries()) > 40
