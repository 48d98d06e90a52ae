"""Faults of the model as clients meet them, over HTTP: `faulty_server` is the real server with a model that breaks."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.process import Program, ProgramFailed, free_port
from tests.support.faulty_server import HANG, KEEP_GIL, KILL, MAX_ROWS, POISON
from tests.support.server_process import ServerProcess

PREDICT = "/v1/models/mistral-7b:predict"
LONG = {"max_new_tokens": 400, "min_new_tokens": 400, "temperature": 0}
FOREVER = {"max_new_tokens": 4000, "min_new_tokens": 4000, "temperature": 0}
BUSY_S = 1
"""What a busy machine may add to a promised second."""

StartFaulty = Callable[..., tuple[Program, str]]


@pytest.fixture(scope="module")
def start_faulty(model_dir: Path) -> Iterator[StartFaulty]:
    """A factory of faulty servers and their URLs; all are stopped at the end."""
    with ExitStack() as programs:

        def start(last_words_dir: Path, *flags: str) -> tuple[Program, str]:
            port = free_port()
            command = [sys.executable, "-m", "tests.support.faulty_server", "--model_dir", str(model_dir)]
            command += ["--http_port", str(port), "--dtype", "float32", *flags]
            program = programs.enter_context(Program(command, {"OMP_NUM_THREADS": "1", "TMPDIR": str(last_words_dir)}))
            program.wait_until_ready(port, "/v2/health/ready", limit_s=90)
            return program, f"http://127.0.0.1:{port}"

        yield start


@pytest.fixture(scope="module")
def faulty(start_faulty: StartFaulty, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a faulty server for the faults that it survives."""
    return start_faulty(tmp_path_factory.mktemp("words"))[1]


class Streams:
    """Clients that read streams in threads; each result is the status, the headers and the lines of data."""

    def __init__(self, url: str, bodies: Sequence[dict[str, Any]]) -> None:
        self._url = url
        self._pool = ThreadPoolExecutor(len(bodies))
        self._begun: Future[None] = Future()
        self._left_to_begin = len(bodies)
        self._reading = [self._pool.submit(self._read, body) for body in bodies]

    def _read(self, body: dict[str, Any]) -> httpx.Response:
        with httpx.stream("POST", self._url + PREDICT, json={"stream": True, **body}, timeout=60) as response:
            content = b""
            for piece in response.iter_raw():
                if not content:
                    self._note_begun()
                content += piece
        return httpx.Response(response.status_code, headers=response.headers, content=content)

    def _note_begun(self) -> None:
        self._left_to_begin -= 1
        if self._left_to_begin == 0:
            self._begun.set_result(None)

    def wait_until_begun(self) -> None:
        """Return when every stream has had its first bytes."""
        self._begun.result(30)

    def results(self) -> list[httpx.Response]:
        return [reading.result(60) for reading in self._reading]


def whole(response: httpx.Response) -> bool:
    return response.status_code == 200 and response.text.endswith("data: [DONE]\n\n")


def error_event(response: httpx.Response) -> dict[str, str]:
    """Return the error that ended a stream."""
    *_, last, rest = response.text.split("\n\n")
    event, data = last.split("\n")
    assert (event, rest) == ("event: error", "")
    return json.loads(data.removeprefix("data: "))


def test_a_prompt_that_breaks_its_step_fails_alone(faulty: str) -> None:
    others = Streams(faulty, [{"prompt": f"hello {i}", **LONG} for i in range(3)])
    others.wait_until_begun()

    plain = httpx.post(faulty + PREDICT, json={"prompt": POISON, "temperature": 0})
    streamed = httpx.post(faulty + PREDICT, json={"prompt": POISON, "temperature": 0, "stream": True})

    assert [(r.status_code, r.json()["code"]) for r in (plain, streamed)] == [(500, "internal")] * 2
    assert "poison" not in plain.text
    assert all(map(whole, others.results()))


def test_out_of_memory_sheds_the_newest_and_answers_the_others(faulty: str) -> None:
    alone = Streams(faulty, [{"prompt": "hello 0", **LONG}]).results()[0]
    older = Streams(faulty, [{"prompt": f"hello {i}", **LONG} for i in range(MAX_ROWS)])
    older.wait_until_begun()

    newest = [httpx.post(faulty + PREDICT, json={"prompt": "hello", "stream": s, **LONG}) for s in (False, True)]

    for response in newest:
        assert (response.status_code, response.json()["code"]) == (503, "out_of_memory")
        assert int(response.headers["retry-after"]) >= 1
    assert all(map(whole, older.results()))
    assert older.results()[0].text == alone.text


def test_when_the_engine_dies_every_client_is_told_at_once_and_the_next_start_says_why(
    start_faulty: StartFaulty, start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    _, url = start_faulty(tmp_path)
    streaming = Streams(url, [{"prompt": "hello", **FOREVER}] * 2)
    streaming.wait_until_begun()

    began_s = time.monotonic()
    killed = httpx.post(url + PREDICT, json={"prompt": KILL})
    streamed = streaming.results()
    seconds = time.monotonic() - began_s

    assert (killed.status_code, killed.json()["code"]) == (503, "engine_dead")
    assert [error_event(response)["code"] for response in streamed] == ["engine_dead"] * 2
    assert seconds < 1 + BUSY_S
    assert dead_routes(url) == [(503, "engine_dead"), (503, "not_ready"), (503, "engine_dead")]
    after = start_server("--model_dir", str(tmp_path / "nothing"), environ={"TMPDIR": str(tmp_path)}, ready=False)
    assert after.process.wait(60) == 1
    assert "the last process died: the batch thread died: SystemExit: killed" in after.log


def test_a_step_that_hangs_is_noticed_and_the_process_still_ends_when_told(
    start_faulty: StartFaulty, tmp_path: Path
) -> None:
    program, url = start_faulty(tmp_path, "--stall_seconds", "1")
    streaming = Streams(url, [{"prompt": "hello", **FOREVER}])
    streaming.wait_until_begun()

    began_s = time.monotonic()
    hung = httpx.post(url + PREDICT, json={"prompt": HANG}, timeout=30)
    [streamed] = streaming.results()
    seconds = time.monotonic() - began_s

    assert (hung.status_code, hung.json()["code"]) == (503, "engine_dead")
    assert error_event(streamed)["code"] == "engine_dead"
    assert 1 <= seconds < 2 + BUSY_S
    assert dead_routes(url) == [(503, "engine_dead"), (503, "not_ready"), (503, "engine_dead")]
    assert "taken more than 1 s" in (tmp_path / "mistral-termination-reason").read_text()
    os.kill(program.pid, signal.SIGTERM)
    program.wait_for_exit(limit_s=5)


def test_a_call_that_keeps_the_interpreters_lock_ends_the_process_with_the_stacks_in_its_log(
    start_faulty: StartFaulty, tmp_path: Path
) -> None:
    program, url = start_faulty(tmp_path, "--watchdog_seconds", "5")
    # The running event loop postpones the end.
    assert whole(Streams(url, [{"prompt": "hello", **LONG}]).results()[0])

    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(url + PREDICT, json={"prompt": KEEP_GIL}, timeout=60)

    with pytest.raises(ProgramFailed, match="Exited with 1"):
        program.wait_for_exit(limit_s=60)
    assert "Timeout (0:00:05)!" in program.log()
    assert "in faulty" in program.log()


def dead_routes(url: str) -> list[tuple[int, str]]:
    """Return what liveness, readiness and a new request answer."""
    responses = [
        httpx.get(f"{url}/v2/health/live"),
        httpx.get(f"{url}/v2/health/ready"),
        httpx.post(url + PREDICT, json={"prompt": "hello"}),
    ]
    return [(response.status_code, response.json()["code"]) for response in responses]
