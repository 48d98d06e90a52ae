"""`mistral batch` over real HTTP: each request answered once, whatever stops it in between."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mistral_cli.app import app
from tests.support.scripted_server import Act, ScriptedServer, answer_json, hang_up, predictions
from tests.support.server_process import free_port

OK = answer_json({"usage": {"completion_tokens": 4}, "choices": []}, x_request_id="r1")
BUSY = answer_json({"error": "The queue is full.", "code": "queue_full"}, 429, retry_after="0")
FAULT = answer_json({"error": "The server failed.", "code": "internal"}, 500)
REFUSED = answer_json({"error": "prompt is missing.", "code": "bad_request"}, 400)


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_cli.retry.FIRST_DELAY_S", 0.01)


def request(custom_id: str = "a", **changes: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1", "body": {"prompt": custom_id}} | changes)


def run(tmp_path: Path, lines: Iterable[str], *acts: Act, args: tuple[str, ...] = ()) -> tuple[Result, ScriptedServer]:
    """Run one batch against a server that plays these acts; files are in.jsonl, out.jsonl, out.jsonl.errors."""
    (tmp_path / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with ScriptedServer(list(acts)) as server:
        files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
        result = CliRunner().invoke(app, ["batch", *files, "--url", server.url, *args])
    return result, server


def results(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_request_has_one_answer_in_openais_form(tmp_path):
    result, server = run(tmp_path, [request("a"), "", request("b")], OK)

    answers = results(tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    assert {answer["custom_id"] for answer in answers} == {"a", "b"}
    assert answers[0]["response"] == {
        "status_code": 200,
        "request_id": "r1",
        "body": {"usage": {"completion_tokens": 4}, "choices": []},
    }
    assert answers[0]["error"] is None
    assert sorted(asked.body["prompt"] for asked in server.asked) == ["a", "b"]
    assert {asked.path for asked in server.asked} == {"/v1"}
    assert results(tmp_path / "out.jsonl.errors") == []


def test_a_second_run_asks_only_for_what_has_no_result(tmp_path):
    run(tmp_path, [request("a"), request("bad")], answer_json({}), REFUSED, args=("--max-concurrency", "1"))

    result, server = run(tmp_path, [request("a"), request("bad"), request("c")], OK)

    assert result.exit_code == 0
    assert [asked.body["prompt"] for asked in server.asked] == ["c"]


def test_a_refused_request_goes_to_the_file_of_errors(tmp_path):
    result, _ = run(tmp_path, [request("a")], REFUSED)

    [error] = results(tmp_path / "out.jsonl.errors")
    assert result.exit_code == 1
    assert error["response"]["status_code"] == 400
    assert error["response"]["body"]["error"] == "prompt is missing."
    assert results(tmp_path / "out.jsonl") == []


@pytest.mark.parametrize("once", [BUSY, FAULT, hang_up], ids=["429", "500", "dropped"])
def test_a_request_that_fails_for_now_is_sent_again(tmp_path, once):
    result, server = run(tmp_path, [request("a")], once, OK)

    assert result.exit_code == 0, result.output
    assert len(server.asked) == 2


def test_a_request_that_always_fails_is_an_error_after_five_attempts(tmp_path):
    result, server = run(tmp_path, [request("a")], FAULT)

    assert result.exit_code == 1
    assert results(tmp_path / "out.jsonl.errors")[0]["response"]["status_code"] == 500
    assert len(server.asked) == 5


def test_a_server_that_does_not_come_ends_the_batch_and_loses_nothing(tmp_path):
    (tmp_path / "in.jsonl").write_text(request("a"))
    args = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--url", f"127.0.0.1:{free_port()}"]

    result = CliRunner().invoke(app, [*args, "--wait", "1"])

    assert result.exit_code == 4
    assert "Gave up: no answer for 1 s" in result.output
    assert results(tmp_path / "out.jsonl") == results(tmp_path / "out.jsonl.errors") == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "custom_id must be a text of 1 to 512 characters"),
        (request(custom_id="\ud800"), "half of a surrogate pair"),
        (request(method="GET"), "method must be POST, not 'GET'"),
        (request(url="http://elsewhere/v1"), "url must be a path of the server"),
        (request(url="/v1 x"), "url must be a path of the server"),
        (request(body="x"), "body must be a JSON object"),
        (request(body={"stream": True}), "body.stream must be false"),
    ],
)
def test_a_wrong_line_is_an_error_and_stops_no_other(tmp_path, line, reason):
    result, _ = run(tmp_path, [line, request("good")], OK)

    [error] = results(tmp_path / "out.jsonl.errors")
    assert result.exit_code == 1
    assert error["error"]["code"] == "invalid_line"
    assert error["error"]["message"].startswith("Line 1: ")
    assert reason in error["error"]["message"]
    assert [answer["custom_id"] for answer in results(tmp_path / "out.jsonl")] == ["good"]


def test_a_repeated_id_is_sent_once_and_reported(tmp_path):
    result, server = run(tmp_path, [request("a"), request("a")], OK)

    assert result.exit_code == 1
    assert "1 lines repeat the custom_id" in result.output
    assert len(server.asked) == 1


def test_a_torn_last_line_is_cut_off_and_its_request_sent_again(tmp_path):
    run(tmp_path, [request("a"), request("b")], OK)
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(whole[:-10])

    result, server = run(tmp_path, [request("a"), request("b")], OK)

    assert result.exit_code == 0
    assert len(server.asked) == 1
    assert sorted(answer["custom_id"] for answer in results(tmp_path / "out.jsonl")) == ["a", "b"]


def test_a_file_of_something_else_is_not_written_to(tmp_path):
    (tmp_path / "out.jsonl").write_text("dear diary\n")

    result, _ = run(tmp_path, [request("a")], OK)

    assert result.exit_code == 2
    assert "line 1, is not a result of `mistral batch`" in result.output
    assert (tmp_path / "out.jsonl").read_text() == "dear diary\n"


def test_a_missing_input_is_a_sentence(tmp_path):
    result = CliRunner().invoke(app, ["batch", str(tmp_path / "none"), str(tmp_path / "out.jsonl"), "--url", "x"])

    assert result.exit_code == 2
    assert "cannot be read: No such file" in result.output


def test_requests_come_from_stdin(tmp_path):
    with ScriptedServer([predictions("hi")]) as server:
        args = ["batch", "-", str(tmp_path / "out.jsonl"), "--url", server.url]
        result = CliRunner().invoke(app, args, input=request("a"))

    assert result.exit_code == 0, result.output
    assert results(tmp_path / "out.jsonl")[0]["response"]["body"]["predictions"][0]["generated_text"] == "hi"


class Crowd:
    """Answers everything after a moment, refuses what is above its size, and notes the most that it held at once."""

    def __init__(self, size: int) -> None:
        self.size, self.now, self.most = size, 0, 0
        self._lock = threading.Lock()

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
            full = self.now > self.size
        threading.Event().wait(0.005)
        with self._lock:
            self.now -= 1
        (BUSY if full else OK)(handler)


def test_a_full_queue_is_obeyed_and_every_request_is_answered(tmp_path):
    crowd = Crowd(size=4)

    result, _ = run(tmp_path, [request(str(i)) for i in range(100)], crowd)

    assert result.exit_code == 0, result.output
    assert len(results(tmp_path / "out.jsonl")) == 100


def test_killed_at_any_moment_it_answers_each_id_exactly_once(tmp_path):
    ids = [str(i) for i in range(400)]
    (tmp_path / "in.jsonl").write_text("".join(f"{request(i)}\n" for i in ids))
    chance = random.Random(5)
    with ScriptedServer([Crowd(size=16)]) as server:
        command = [sys.executable, "-m", "mistral_cli", "batch", "in.jsonl", "out.jsonl", "--url", server.url]
        environ = {**os.environ, "PYTHONPATH": os.getcwd()}
        kills = 0
        while True:
            process = subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.DEVNULL)
            goal = len(server.asked) + chance.randint(1, 120)
            while process.poll() is None and len(server.asked) < goal and kills < 4:
                time.sleep(0.001)
            if kills == 4:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        assert process.wait(60) == 0

    counts = Counter(answer["custom_id"] for answer in results(tmp_path / "out.jsonl"))
    assert counts == Counter(ids)
