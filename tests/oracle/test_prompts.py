"""The prompts of Mistral 7B Instruct v0.3 equal those of mistral-common, the reference of Mistral's formats.

The tokens are compared where its environment is there (`make oracle`). What it made of `conversations.jsonl` is in
`parts.jsonl`, for everywhere else; `encode.py` says with which command.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_server.api.openai.requests import chat_messages
from model_server.api.openai.schema import ChatBody, read
from model_server.api.prompts import ModelLimits, ServedModel
from model_server.api.tools.use import tool_use
from model_server.text import mistral_v3
from model_server.text.mistral_v3 import Control, prompt_parts
from model_server.text.tokenizer import Text
from tests.support.mistral_v3_tokenizer import PYTHON, Oracle, hf_tokenizer
from tests.support.small_tokenizers import with_tools

HERE = Path(__file__).parent
MODEL = ServedModel("m", with_tools(), ModelLimits(max_model_len=4096, vocab_size=500))


def lines(name: str) -> list[Any]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def for_prompt(conversation: dict[str, Any]) -> tuple[list[dict[str, Any]], tuple[dict[str, Any], ...]]:
    """Return messages and tools of a body in OpenAI's form as a request of this server has them."""
    body = read(ChatBody, {"model": "m"} | conversation)
    tools = tool_use(body, MODEL)
    return chat_messages(body.messages), tools.definitions if tools else ()


@pytest.mark.parametrize(
    ("conversation", "parts"), list(zip(lines("conversations.jsonl"), lines("parts.jsonl"), strict=True))
)
def test_a_prompt_has_the_parts_that_mistral_common_makes(conversation: dict[str, Any], parts: list[Any]) -> None:
    ours = prompt_parts(*for_prompt(conversation))

    assert [[part.token, None] if isinstance(part, Control) else [None, part] for part in ours] == parts


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    if not PYTHON.exists():
        pytest.skip("mistral-common's environment is not there: make oracle")
    oracle = Oracle()
    yield oracle
    oracle.close()


@pytest.fixture(scope="module")
def template_to_fix(monkeypatch_module: pytest.MonkeyPatch) -> None:
    """Let the template of the test's tokenizer be one of those that are replaced."""
    of_test = hashlib.sha256(b"notused").hexdigest()
    monkeypatch_module.setattr(mistral_v3, "KNOWN_TEMPLATES", frozenset({of_test}))


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", params=["prepend", "metaspace"])
def text(request: pytest.FixtureRequest, oracle: Oracle, template_to_fix: None) -> Text:
    return Text(hf_tokenizer(oracle.pieces, request.param))


CONTROL = ["[INST]", "[/INST]", "<s>", "</s>", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<0x0A>"]
characters = st.characters(exclude_categories=["Cs"])
words = st.text(characters, max_size=12) | st.sampled_from(
    ["  two spaces ", "\n\n", "▁", "naïve 日本語 👩‍👩‍👧", '"{}\\"', *CONTROL]
)
texts = st.lists(words, max_size=4).map("".join)
some_text = texts.filter(lambda text: text.strip(" "))
names = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=8)
ids = st.text(string.ascii_letters + string.digits, min_size=9, max_size=9)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
as_json = values.map(lambda value: json.dumps(value)) | values.map(lambda value: json.dumps(value, ensure_ascii=False))
arguments = st.dictionaries(texts, values, max_size=3).map(json.dumps) | st.sampled_from(["", "{", "{}"])


@st.composite
def tool_rounds(draw: st.DrawFn) -> list[dict[str, Any]]:
    call_ids = draw(st.lists(ids, min_size=1, max_size=3, unique=True))
    calls = [
        {"id": call_id, "type": "function", "function": {"name": draw(names), "arguments": draw(arguments)}}
        for call_id in call_ids
    ]
    results = [{"role": "tool", "tool_call_id": call_id, "content": draw(as_json | texts)} for call_id in call_ids]
    return [{"role": "assistant", "tool_calls": calls}, *draw(st.permutations(results))]


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(0, 2))):
        messages.append({"role": "system", "content": draw(texts)})
    for earlier in range(draw(st.integers(0, 2)), -1, -1):
        for _ in range(draw(st.integers(1, 2))):
            messages.append({"role": "user", "content": draw(texts)})
        if draw(st.booleans()):
            messages += draw(tool_rounds())
        if earlier:
            messages.append({"role": "assistant", "content": draw(some_text)})
    functions = draw(
        st.lists(
            st.fixed_dictionaries(
                {"name": names},
                optional={
                    "description": texts,
                    "strict": st.booleans(),
                    "parameters": st.fixed_dictionaries(
                        {"type": st.just("object")}, optional={"title": texts, "default": values}
                    ),
                },
            ),
            max_size=3,
            unique_by=lambda function: function["name"],
        )
    )
    return {"messages": messages, "tools": [{"type": "function", "function": function} for function in functions]}


@given(conversation=conversations())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_prompt_has_the_tokens_of_mistral_common(conversation: dict[str, Any], text: Text, oracle: Oracle) -> None:
    expected = oracle.encode(conversation)

    assert text.encode_chat(*for_prompt(conversation))[1] == expected
