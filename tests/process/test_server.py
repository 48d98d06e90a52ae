"""The server as a process: real HTTP over a socket, real signals, real clients."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from kserve import InferenceRESTClient, RESTConfig

from tests.support.malformed import MALFORMED
from tests.support.server_process import ServerProcess

PREDICT = "/v1/models/mistral-7b:predict"
FOREVER = {"max_new_tokens": 4000, "min_new_tokens": 4000, "temperature": 0}
BEAMS = {"num_beams": 4, "max_new_tokens": 4000, "min_new_tokens": 3999, "temperature": 0}
GREEDY = {"temperature": 0, "max_new_tokens": 24}
PROMPTS = ["hello world", "日本語 🎉 é", "The meaning of life is", "  two spaces", "👩‍👩‍👧‍👦👍🏽"]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def predict(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """Return the one prediction of a call that must succeed."""
    response = client.post(PREDICT, json=body)
    assert response.status_code == 200, response.text
    (prediction,) = response.json()["predictions"]
    return prediction


def sse(lines: Iterator[str]) -> Iterator[Any]:
    """Yield the data of each event; "[DONE]" as it stands."""
    for line in lines:
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name) and not line.startswith("#"))


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("fields", [GREEDY, {"seed": 3, "temperature": 1.5, "top_k": 0, "top_p": 1}], ids=str)
def test_a_stream_joined_equals_the_answer_without_stream(
    client: httpx.Client, prompt: str, fields: dict[str, Any]
) -> None:
    whole = predict(client, prompt=prompt, **fields)

    with client.stream("POST", PREDICT, json={"prompt": prompt, "stream": True, **fields}) as response:
        *events, last, done = sse(response.iter_lines())

    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert "".join(event["text"] for event in events) == whole.pop("generated_text")
    assert (last, done) == ({"text": "", **whole}, "[DONE]")


def test_a_stream_arrives_as_it_is_made(client: httpx.Client) -> None:
    with client.stream("POST", PREDICT, json={"prompt": "hello", "stream": True, **FOREVER}) as response:
        events = sse(response.iter_lines())
        first = next(events)
        running = metric(client, "mistral_requests_running")

    assert first["text"]
    assert running == 1


def test_plain_text_is_streamed_to_who_accepts_it(client: httpx.Client) -> None:
    body = {"prompt": "hello", "stream": True, **GREEDY}

    response = client.post(PREDICT, json=body, headers={"Accept": "text/plain"})

    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.text == predict(client, prompt="hello", **GREEDY)["generated_text"]


def test_the_three_bodies_mean_the_same(client: httpx.Client) -> None:
    response = client.post(PREDICT, json={"instances": ["hello", {"prompt": "hello"}], "parameters": GREEDY})

    assert response.json()["predictions"] == [predict(client, prompt="hello", **GREEDY)] * 2


def test_a_seed_gives_the_same_text_beside_other_requests(client: httpx.Client) -> None:
    seeded = {"prompt": "hello", "seed": 11, "temperature": 2, "top_k": 0, "top_p": 1, "max_new_tokens": 30}
    alone = predict(client, **seeded)

    instances = [seeded, *({"prompt": p, "temperature": 2, "max_new_tokens": 30} for p in PROMPTS * 3)]
    beside = client.post(PREDICT, json={"instances": instances}).json()["predictions"]

    assert beside[0] == alone


def test_kserves_own_client_is_answered(server: ServerProcess, client: httpx.Client) -> None:
    async def ask() -> Any:
        kserve = InferenceRESTClient(RESTConfig(protocol="v1", timeout=60))
        try:
            assert await kserve.is_model_ready(server.url, "mistral-7b")
            body = {"instances": ["hello"], "parameters": GREEDY}
            return await kserve.infer(server.url, body, model_name="mistral-7b")
        finally:
            await kserve.close()

    assert asyncio.run(ask())["predictions"] == [predict(client, prompt="hello", **GREEDY)]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_is_answered(server: ServerProcess) -> None:
    body = json.dumps({"prompt": "hello", "stream": True, **GREEDY})

    done = subprocess.run(["curl", "-sN", server.url + PREDICT, "-d", body], capture_output=True, text=True, check=True)

    assert done.stdout.endswith("data: [DONE]\n\n")


def test_every_malformed_body_is_a_quick_400_that_names_its_field(client: httpx.Client) -> None:
    wrong = []
    for name, body, word in MALFORMED:
        began_s = time.monotonic()
        response = client.post(PREDICT, content=body)
        seconds = time.monotonic() - began_s
        if response.status_code != 400 or word not in response.json()["error"] or seconds > 1:
            wrong.append((name, response.status_code, response.text[:200], seconds))

    assert wrong == []
    assert predict(client, prompt="hello", **GREEDY)["completion_tokens"] > 0


def test_the_log_has_one_line_a_request_and_none_for_probes(server: ServerProcess, client: httpx.Client) -> None:
    client.post(PREDICT, json={"prompt": "hello", **GREEDY}, headers={"X-Request-Id": "log-of-an-answer"})
    client.post(PREDICT, json={"prompt": 5}, headers={"X-Request-Id": "log-of-a-refusal"})
    client.get("/v2/health/ready")

    wait_for(lambda: "log-of-an-answer" in server.log and "log-of-a-refusal" in server.log)
    assert [server.log.count(f"log-of-{what}") for what in ("an-answer", "a-refusal")] == [1, 1]
    assert "uvicorn.access" not in server.log


def test_a_body_that_is_too_large_is_refused(client: httpx.Client) -> None:
    response = client.post(PREDICT, content=b'{"prompt": "' + b"x" * 2**20 + b'"}')

    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("fields", [FOREVER, BEAMS], ids=["batch", "fallback"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(client: httpx.Client, fields: dict[str, Any], stream: bool) -> None:
    if stream and fields is BEAMS:
        fields = {"guidance_scale": 1.5, **FOREVER}
    body = {"prompt": "hello", "stream": stream, **fields}
    if stream:
        with client.stream("POST", PREDICT, json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post(PREDICT, json=body, timeout=0.5)

    wait_for(lambda: metric(client, "mistral_requests_running") == 0)


def test_an_unknown_model_or_route_is_a_404_in_our_shape(client: httpx.Client) -> None:
    answers = [client.post("/v1/models/other:predict", json={}), client.get("/nothing")]

    assert [(a.status_code, a.json()["code"]) for a in answers] == [(404, "model_not_found"), (404, "not_found")]


def test_the_model_cannot_be_unloaded_from_outside(client: httpx.Client) -> None:
    assert client.post("/v2/repository/models/mistral-7b/unload").status_code == 404
    assert client.get("/v1/models/mistral-7b").status_code == 200


def stream_to_the_end(server: ServerProcess, ends: list[str], **fields: Any) -> threading.Thread:
    """Read one stream in a thread; `ends` gets its last line of data."""

    def read() -> None:
        body = {"prompt": "hello", "stream": True, "temperature": 0, **fields}
        with httpx.stream("POST", server.url + PREDICT, json=body, timeout=60) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        ends.append(lines[-1])

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def running(server: ServerProcess) -> float:
    with httpx.Client(base_url=server.url) as client:
        return metric(client, "mistral_requests_running")


def test_sigterm_lets_streams_finish_and_refuses_new_ones_with_503(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--max_batch_size", "8")
    ends: list[str] = []
    streams = [stream_to_the_end(server, ends, max_new_tokens=600, min_new_tokens=600) for _ in range(8)]
    wait_for(lambda: running(server) == 8)

    server.terminate()
    wait_for(lambda: httpx.get(f"{server.url}/v2/health/ready").status_code == 503)
    refused = httpx.post(server.url + PREDICT, json={"prompt": "hello"})
    live = httpx.get(f"{server.url}/v2/health/live")
    for thread in streams:
        thread.join()

    assert (refused.status_code, refused.json()["code"]) == (503, "draining")
    assert int(refused.headers["retry-after"]) >= 1
    assert live.status_code == 200
    assert ends == ["data: [DONE]"] * 8
    assert server.process.wait(10) == 0


def test_streams_that_outlast_the_drain_end_with_an_error_event(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--drain_seconds", "0.2")
    ends: list[str] = []
    streams = [stream_to_the_end(server, ends, max_new_tokens=4000, min_new_tokens=4000) for _ in range(4)]
    wait_for(lambda: running(server) == 4)

    server.terminate()
    for thread in streams:
        thread.join()

    assert [json.loads(end.removeprefix("data: "))["code"] for end in ends] == ["draining"] * 4
    assert server.process.wait(10) == 0


def test_an_idle_server_stops_within_two_seconds(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    began_s = time.monotonic()

    server.terminate()

    assert server.process.wait(10) == 0
    assert time.monotonic() - began_s < 2


def test_a_second_signal_ends_the_process_at_once(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    body = {"prompt": "hello", "stream": True, **FOREVER}
    with httpx.stream("POST", server.url + PREDICT, json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.terminate()
        wait_for(lambda: httpx.get(f"{server.url}/v2/health/ready").status_code == 503)
        server.terminate()

        assert server.process.wait(5) == 128 + 15


def test_a_wrong_setting_stops_the_start_with_one_sentence(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(environ={"MISTRAL_MAX_BATCH_SIZ": "3"}, ready=False)

    assert server.process.wait(60) == 1
    assert server.log.strip().splitlines()[-1].startswith("error: MISTRAL_MAX_BATCH_SIZ is not a setting")
    assert "Traceback" not in server.log


def test_a_start_says_why_the_last_process_died(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    (tmp_path / "mistral-termination-reason").write_text("the batch thread died: ValueError: poison\n")

    server = start_server("--model_dir", str(tmp_path / "nothing"), environ={"TMPDIR": str(tmp_path)}, ready=False)

    assert server.process.wait(60) == 1
    assert "the last process died: the batch thread died: ValueError: poison" in server.log
    assert not (tmp_path / "mistral-termination-reason").exists()


def test_a_missing_model_stops_the_start_with_one_sentence(
    start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    server = start_server("--model_dir", str(tmp_path / "nothing"), ready=False)

    assert server.process.wait(60) == 1
    assert server.log.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in server.log
