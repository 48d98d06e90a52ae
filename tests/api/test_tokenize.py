"""`/tokenize` and `/detokenize`: the tokens that a request would have, in vLLM's form."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support.server_process import ServerProcess
from tests.support.small_tokenizers import byte_fallback

TEXT = byte_fallback()
MESSAGES = [{"role": "user", "content": "hello world"}]


def post(server: ServerProcess, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60)


def test_the_tokens_of_a_prompt_are_those_that_a_completion_counts(server: ServerProcess) -> None:
    answer = post(server, "/tokenize", model="mistral-7b", prompt="hello world").json()
    completion = post(server, "/openai/v1/completions", model="mistral-7b", prompt="hello world", max_tokens=1).json()

    ids = TEXT.encode("hello world")
    assert answer == {"count": len(ids), "max_model_len": 4096, "tokens": ids, "token_strs": None}
    assert completion["usage"]["prompt_tokens"] == len(ids)


def test_special_tokens_are_left_out_on_request_and_tokens_are_named(server: ServerProcess) -> None:
    answer = post(server, "/tokenize", prompt="hello", add_special_tokens=False, return_token_strs=True).json()

    assert answer["tokens"] == TEXT.encode("hello")[1:]
    assert answer["token_strs"] == TEXT.tokenizer.convert_ids_to_tokens(answer["tokens"])


def test_the_tokens_of_messages_are_those_of_the_chat_template(server: ServerProcess) -> None:
    answer = post(server, "/tokenize", messages=MESSAGES, add_generation_prompt=True, add_special_tokens=False).json()

    assert answer["tokens"] == TEXT.encode_chat(MESSAGES)[1]


def test_tools_are_part_of_the_messages(tool_server: ServerProcess) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

    without, with_tools, unused = (
        post(tool_server, "/tokenize", messages=MESSAGES, **more).json()["count"]
        for more in ({}, {"tools": [tool]}, {"tools": [tool], "tool_choice": "none"})
    )

    assert without == unused < with_tools


def test_the_text_of_tokens_has_its_special_tokens(server: ServerProcess) -> None:
    ids = TEXT.encode("The meaning of life")

    assert post(server, "/detokenize", tokens=ids).json() == {"prompt": TEXT.full_text(ids)}
    assert post(server, "/detokenize", tokens=[]).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "part"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 3}, 400, "prompt must be"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "send only one of them"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}, 400, "add_generation_prompt"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "no model"),
        ("/tokenize", {"prompt": "x" * 200_000}, 400, "4096 tokens hold at most"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "token ids from 0"),
        ("/detokenize", {"tokens": [10**9]}, 400, "token ids from 0"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1] * 4097}, 400, "maximum context length"),
    ],
)
def test_a_wrong_body_is_refused_with_its_field(
    server: ServerProcess, path: str, body: dict[str, Any], status: int, part: str
) -> None:
    response = post(server, path, **body)

    assert response.status_code == status
    assert part in response.json()["error"]


def test_both_routes_are_counted(server: ServerProcess) -> None:
    post(server, "/tokenize", prompt="a")
    post(server, "/detokenize", tokens=[5])

    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'mistral_requests_total{outcome="ok",route="tokenize"}' in metrics
    assert 'mistral_requests_total{outcome="ok",route="detokenize"}' in metrics


def test_both_routes_need_a_key_where_the_server_has_keys(start_server: Any, tmp_path: Any) -> None:
    (tmp_path / "keys").write_text("secret\n")
    server = start_server("--api_key_file", str(tmp_path / "keys"))

    assert [post(server, path, prompt="a").status_code for path in ("/tokenize", "/detokenize")] == [401, 401]
