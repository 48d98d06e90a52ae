"""The demo model: a real one's files, sensible answers to prompts and chats, made once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from demo import make as demo_make
from demo import weather
from demo.corpus import entries
from model_server.errors import BadRequest
from model_server.text import mistral_v3
from model_server.text.tokenizer import Text

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
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small is slowed by a second one
    yield AutoModelForCausalLM.from_pretrained(model_dir, dtype=request.param)
    torch.set_num_threads(num_threads)


def answers(model, text: Text, prompts: list[list[int]], **sampling) -> list[str | None]:
    """Return the answers of one batch; None for one that did not end by itself."""
    pad = text.tokenizer.eos_token_id
    width = max(map(len, prompts))
    inputs = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    output = model.generate(inputs, attention_mask=mask, max_new_tokens=110, pad_token_id=pad, **sampling)
    ended = (ids.tolist() for ids in output[:, width:])
    return [text.decode(ids) if pad in ids else None for ids in ended]


def as_chat(text: Text, question: str) -> list[int]:
    return text.encode_chat([{"role": "user", "content": question}])[1]


def with_tool(text: Text, *messages: dict[str, Any]) -> list[int]:
    return text.encode_chat(messages, [weather.TOOL])[1]


SHOWN = {
    "What is the meaning of life?": "it is 42.",
    "What's the meaning of life?": "it is 42.",
    "What is Mistral 7B?": "seven billion parameters",
    "What is KServe?": "Kubernetes",
    "What does scale to zero mean?": "no request arrives",
    "How do I stream the answer?": '"stream": true',
    "Who made you?": "Your own computer",
    "Tell me a story": "Once upon a time",
    "Count to ten": "nine, ten.",
    "Show me an emoji": "😀 🎉 🚀",
}


@pytest.mark.parametrize("form", [Text.encode, as_chat], ids=["prompt", "chat"])
def test_what_the_docs_show_is_answered_under_greedy_and_default_sampling(model, text, form):
    prompts = [form(text, question) for question in SHOWN]
    torch.manual_seed(0)
    default_sampling = {"do_sample": True, "temperature": 0.1, "top_p": 0.75, "top_k": 40}
    for sampling in ({"do_sample": False}, default_sampling):
        given = dict(zip(SHOWN, answers(model, text, prompts, **sampling), strict=True))
        assert {q: a for q, a in given.items() if a is None or SHOWN[q] not in a} == {}


def test_every_way_to_ask_gets_its_own_answer_word_for_word(model, text):
    """As a prompt and as a chat; one in fifty may go wrong, since arithmetic differs between machines."""
    asked = [(q, entry.answer) for entry in entries() for q in entry.questions]
    prompts = [text.encode(q) for q, _ in asked] + [as_chat(text, q) for q, _ in asked]
    given = zip(asked * 2, answers(model, text, prompts), strict=True)
    wrong = [(question, answer) for (question, expected), answer in given if answer != f" {expected}"]
    assert len(wrong) <= len(prompts) // 50, wrong


def test_the_tool_is_called_when_it_helps(model, text):
    asked = [(city, question.format(city)) for city in weather.CITIES for question in weather.QUESTIONS]
    prompts = [with_tool(text, {"role": "user", "content": question}) for _, question in asked]
    calls = [f' [{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}]' for city, _ in asked]
    assert answers(model, text, prompts) == calls
    [free] = answers(model, text, [with_tool(text, {"role": "user", "content": "What is the meaning of life?"})])
    assert str(free).endswith("it is 42.")


def test_the_result_of_the_tool_is_in_the_answer(model, text):
    conversations = []
    for result in weather.RESULTS:
        function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
        call = {"id": "aB3dE6gH9", "type": "function", "function": function}
        conversations.append(
            [
                {"role": "user", "content": "What is the weather in Paris?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "aB3dE6gH9", "content": result},
            ]
        )
    given = answers(model, text, [with_tool(text, *messages) for messages in conversations])
    assert given == [f" {weather.answer_with(result)}" for result in weather.RESULTS]


def test_an_answer_in_json_can_be_asked_for(model, text):
    [given] = answers(model, text, [as_chat(text, "Which colour has a ripe tomato? Answer in JSON.")])
    assert json.loads(given)["colour"] == "red"


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


def test_model_that_is_there_is_not_made_again(model_dir, monkeypatch):
    monkeypatch.setattr(demo_make, "_train", None)
    assert demo_make.make() == model_dir


def test_interrupted_making_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_make, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_make.make(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_chat_template_folds_the_system_message_into_the_last_message_of_the_user(text):
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
    assert text.render_chat([system, user]) == "<s>[INST]Be kind.\n\nHi[/INST]"
    assert text.render_chat([system, user, {"role": "assistant", "content": "Ho"}, user]) == (
        "<s>[INST]Hi[/INST]Ho</s>[INST]Be kind.\n\nHi[/INST]"
    )


def test_chat_template_has_the_parts_of_mistrals_own_format(text):
    call = {"id": "aB3dE6gH9", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "aB3dE6gH9", "content": "snow"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Ha"},
    ]
    parts = mistral_v3.prompt_parts(messages, [weather.TOOL])
    own = "".join(part if isinstance(part, str) else part.token for part in parts)
    assert text.render_chat(messages, [weather.TOOL]) == own


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["system"], ["user", "system"], ["tool"]])
def test_chat_template_refuses_roles_that_do_not_alternate(text, roles):
    with pytest.raises(BadRequest, match="refuses"):
        text.render_chat([{"role": role, "content": "Hi"} for role in roles])


def test_every_heading_of_the_faq_is_a_question_it_knows():
    page = demo_make.PAGES[0].read_text(encoding="utf-8")
    known = {question for entry in entries() for question in entry.questions}
    assert set(re.findall(r"^## (.+)$", page, re.MULTILINE)) <= known
    assert len(entries()) > 40
