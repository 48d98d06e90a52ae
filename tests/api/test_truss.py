"""The routes of a hosted Truss: the same bytes as the Truss's own program gives on the same weights, greedy."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from model_server.api.prompts import ModelLimits, ServedModel
from model_server.api.routes import TRUSS_READY_PATHS
from model_server.api.truss import PATHS, answer, parse, pieces
from model_server.errors import BadRequest, OutOfMemory
from model_server.request import TextDelta
from tests.support.fakes import VOCAB_SIZE, ByteText
from tests.support.scripted_model import ScriptedModel, ask, over_a_socket
from tests.support.server_process import ServerProcess

PROMPTS = [
    "What is the meaning of life?",
    "hello\nworld",
    "日本語",
    "  two spaces ",
    "the end of a line\n",
    "naïve 🎉 é",
]
GREEDY = {"max_new_tokens": 48, "do_sample": False}
STREAM_TYPE = "application/octet-stream"


class Truss:
    """The program of the Truss: one `generate`, its output decoded whole or streamed by Transformers' streamer."""

    def __init__(self, model_dir: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    def whole(self, prompt: str, skip_special_tokens: bool = False, **options: Any) -> str:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        output = self.model.generate(**inputs, tokenizer=self.tokenizer, **options)
        return self.tokenizer.decode(output[0], skip_special_tokens=skip_special_tokens)

    def stream(self, prompt: str, **options: Any) -> str:
        streamer = TextIteratorStreamer(self.tokenizer)
        inputs = self.tokenizer(prompt, return_tensors="pt")
        thread = threading.Thread(target=self.model.generate, kwargs=inputs | options | {"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text


@pytest.fixture(scope="module")
def truss(model_dir: Path) -> Truss:
    return Truss(model_dir)


def post(server: ServerProcess, path: str = "/predict", headers: dict[str, str] | None = None, **body: Any) -> Any:
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60)


# Bytes equal to the program's


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_whole_answer_is_the_decoded_output_of_generate(server: ServerProcess, truss: Truss, prompt: str) -> None:
    response = post(server, prompt=prompt, **GREEDY)
    assert response.headers["content-type"] == "application/json"
    assert response.json() == truss.whole(prompt, **GREEDY)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_is_the_text_of_transformers_streamer(server: ServerProcess, truss: Truss, prompt: str) -> None:
    response = post(server, prompt=prompt, stream=True, **GREEDY)
    assert response.headers["content-type"] == STREAM_TYPE
    assert response.content.decode() == truss.stream(prompt, **GREEDY)


def test_an_answer_has_the_bos_and_the_eos(server: ServerProcess, truss: Truss) -> None:
    ended = {"prompt": "hello", "max_new_tokens": 3, "forced_eos_token_id": 2, "do_sample": False}
    text = post(server, **ended).json()
    assert text.startswith("<s> hello")
    assert text.endswith("</s>")
    assert text == truss.whole("hello", max_new_tokens=3, forced_eos_token_id=2, do_sample=False)
    assert post(server, stream=True, **ended).text.endswith("</s>")


def test_special_tokens_can_be_skipped(server: ServerProcess, truss: Truss) -> None:
    prompt = PROMPTS[0]
    text = post(server, prompt=prompt, skip_special_tokens=True, **GREEDY).json()
    assert text == truss.whole(prompt, skip_special_tokens=True, **GREEDY)


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_can_be_left_out(server: ServerProcess, truss: Truss, stream: bool) -> None:
    response = post(server, prompt="hello", return_full_text=False, stream=stream, **GREEDY)
    prompt = truss.tokenizer.decode(truss.tokenizer("hello").input_ids)
    text = response.text if stream else response.json()
    assert prompt + text == (truss.stream if stream else truss.whole)("hello", **GREEDY)


def test_a_stop_string_is_part_of_the_text_as_in_generate(server: ServerProcess, truss: Truss) -> None:
    completion = post(server, prompt="hello", return_full_text=False, **GREEDY).json()
    stop = re.findall("[a-z]{3}", completion)[0]
    text = post(server, prompt="hello", stop_strings=[stop], **GREEDY).json()
    assert text == truss.whole("hello", stop_strings=[stop], **GREEDY)


def test_beams_give_the_text_of_the_best(server: ServerProcess, truss: Truss) -> None:
    beams = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    assert post(server, prompt="hello", **beams).json() == truss.whole("hello", **beams)


def test_a_stream_is_joined_for_a_client_that_accepts_json(server: ServerProcess, truss: Truss) -> None:
    response = post(server, headers={"Accept": "application/json"}, prompt="hello", stream=True, **GREEDY)
    assert response.headers["content-type"] == "application/json"
    assert response.json() == truss.stream("hello", **GREEDY)


# Paths, keys and clients


@pytest.mark.parametrize("path", PATHS)
def test_every_path_answers_the_same(server: ServerProcess, path: str) -> None:
    path = path.replace("{", "").replace("}", "")
    assert post(server, path, prompt="hello", **GREEDY).json() == post(server, prompt="hello", **GREEDY).json()


def test_the_readmes_examples_work_with_only_the_url_replaced(server: ServerProcess) -> None:
    """Of the Truss's README: `truss predict -d` posts this body, and curl posts the same with an Api-Key header."""
    body = json.dumps({"prompt": "What's the meaning of life?", "max_new_tokens": 4096, "temperature": 0})
    url = f"{server.url}/model_versions/YOUR_MODEL_VERSION_ID/predict"
    headers = {"Content-Type": "application/json", "Authorization": "Api-Key YOUR_API_KEY"}

    by_requests = requests.post(url, data=body, headers=headers, timeout=60).json()
    request = urllib.request.Request(url, body.encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        by_urllib = json.load(response)
    options = [option for name, value in headers.items() for option in ("-H", f"{name}: {value}")]
    curl = ["curl", "-s", "-X", "POST", url, *options, "-d", body]
    by_curl = json.loads(subprocess.run(curl, check=True, capture_output=True, timeout=60).stdout)

    assert by_requests == by_urllib == by_curl
    assert by_requests.startswith("<s> What's the meaning of life?")


def test_requests_reads_a_stream_as_it_comes(server: ServerProcess) -> None:
    """The streaming example of the hosted service: `iter_content` over a chunked response."""
    body = {"prompt": "hello", "stream": True, "max_new_tokens": 48, "temperature": 0}
    with requests.post(f"{server.url}/production/predict", json=body, stream=True, timeout=60) as response:
        assert response.headers["transfer-encoding"] == "chunked"
        assert "".join(chunk.decode() for chunk in response.iter_content(None)).startswith("<s> hello")


def test_every_path_needs_a_key_and_takes_the_hosted_services_header(
    start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    server = start_server("--api_key_file", str(keys))
    api_key = {"Authorization": "Api-Key secret"}
    for path in PATHS:
        assert post(server, path, prompt="hello").status_code == 401
        assert post(server, path, headers=api_key, prompt="hello", max_new_tokens=1).status_code == 200
    for path in ("/", *TRUSS_READY_PATHS):
        assert httpx.get(server.url + path).status_code == 200


@pytest.mark.parametrize("path", TRUSS_READY_PATHS)
def test_the_containers_ready_paths_say_whether_requests_are_taken(path: str) -> None:
    model = ScriptedModel()
    assert ask(model, "GET", path).json() == {"ready": True}
    model.accepting = False
    assert ask(model, "GET", path).status_code == 503


def test_a_model_of_the_containers_name_keeps_its_own_answer() -> None:
    model = ScriptedModel()
    model.name = "model"
    assert ask(model, "GET", "/v1/models/model").json() == {"name": "model", "ready": True}


# Errors


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (["hello"], "The body must be a JSON object, not a list of 1."),
        ({}, "prompt must be a string that is not empty, not null."),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages is not supported here: send prompt"),
        ({"prompt": "a", "instances": ["a"]}, "instances is not supported here: send prompt"),
        ({"prompt": "a", "skip_special_tokens": 1}, "skip_special_tokens must be true or false, not 1."),
        ({"prompt": "a", "top_p": 1.5}, "top_p must be a number above 0 and at most 1, not 1.5."),
        ({"prompt": "a", "num_return_sequences": 2}, "num_return_sequences must be 1 on this route"),
        ({"prompt": "a", "num_beams": 2, "stream": True}, "stream must be false with num_beams above 1"),
        ({"prompt": "a" * 5000}, "prompt is 5001 tokens; the maximum context length is 4096"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_body_is_refused_with_its_fields_name(body: Any, sentence: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(body, MODEL)
    assert str(refused.value).startswith(sentence)


MODEL = ServedModel("tiny", ByteText(), ModelLimits(max_model_len=4096, vocab_size=VOCAB_SIZE, eos_token_ids=(2,)))


def test_an_error_is_a_4xx_in_the_servers_shape(server: ServerProcess) -> None:
    response = post(server, prompt="hello", topk=5)
    assert response.status_code == 400
    assert response.json() == {"error": "topk is not a parameter; the nearest is top_k.", "code": "bad_request"}


def test_predict_of_kserve_does_not_know_the_parameter_of_a_truss(server: ServerProcess) -> None:
    assert post(server, "/v1/models/mistral-7b:predict", prompt="a", skip_special_tokens=True).status_code == 400


@pytest.mark.anyio
async def test_a_failure_after_the_first_chunk_breaks_the_stream() -> None:
    call = parse({"prompt": "Once", "stream": True}, MODEL)
    channel = call.requests[0].channel
    channel.send(TextDelta(" upon"))
    channel.send(OutOfMemory("No memory."))
    chunks = await pieces(call)
    assert [await anext(chunks), await anext(chunks)] == [b"Once", b" upon"]
    with pytest.raises(OutOfMemory):
        await anext(chunks)


@pytest.mark.anyio
async def test_a_failure_before_the_first_chunk_is_an_error_of_its_own() -> None:
    call = parse({"prompt": "Once", "stream": True}, MODEL)
    call.requests[0].channel.send(OutOfMemory("No memory."))
    with pytest.raises(OutOfMemory):
        await pieces(call)


@pytest.mark.anyio
async def test_a_whole_answer_that_fails_is_an_error() -> None:
    call = parse({"prompt": "Once"}, MODEL)
    call.requests[0].channel.send(TextDelta(" upon"))
    call.requests[0].channel.send(OutOfMemory("No memory."))
    with pytest.raises(OutOfMemory):
        await answer(call)


@pytest.mark.anyio
async def test_leaving_a_stream_cancels_its_request() -> None:
    call = parse({"prompt": "Once", "stream": True}, MODEL)
    call.requests[0].channel.send(TextDelta(" upon"))
    chunks = await pieces(call)
    await anext(chunks)
    await chunks.aclose()
    assert call.requests[0].cancelled


class FailsHalfWay(ScriptedModel):
    """Generates one piece of text, then fails."""

    served = MODEL

    async def submit(self, parse: Callable[[float], Any]) -> Any:
        call = parse(0.0)
        call.requests[0].channel.send(TextDelta(" upon"))
        call.requests[0].channel.send(OutOfMemory("No memory."))
        return call


def test_a_client_sees_a_failed_stream_as_a_cut_connection() -> None:
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
        over_a_socket(FailsHalfWay(), lambda client: client.post("/predict", json={"prompt": "Once", "stream": True}))


def test_a_failed_stream_that_was_to_be_joined_is_an_error() -> None:
    body = {"prompt": "Once", "stream": True}
    response = ask(FailsHalfWay(), "POST", "/predict", json=body, headers={"Accept": "application/json"})
    assert (response.status_code, response.json()["code"]) == (503, "out_of_memory")
