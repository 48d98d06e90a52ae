"""`mistral predict` when the server is not there yet, refuses, or cuts its answer short."""

from __future__ import annotations

import threading

import httpx
import pytest
from typer.testing import CliRunner

from mistral_cli.app import app
from mistral_cli.exit_codes import GaveUp
from mistral_cli.retry import Retry
from tests.support.client_runs import predict
from tests.support.scripted_server import (
    DONE,
    Act,
    ScriptedServer,
    after,
    answer_bytes,
    answer_json,
    error_event,
    event,
    hang_up,
    last_event,
    predictions,
    stream,
)
from tests.support.server_process import free_port

BUSY = answer_json({"error": "The queue is full.", "code": "queue_full"}, 429, retry_after="0")
LOADING = answer_json({"error": "The model is loading.", "code": "not_ready"}, 503, retry_after="0")
WHOLE_STREAM = (event("Hello"), event(", wörld"), last_event(4), DONE)


# Waiting


@pytest.mark.parametrize(
    "not_yet",
    [BUSY, LOADING, hang_up, answer_bytes(b"activator request timeout", 504), answer_bytes(b"upstream", 502)],
    ids=["429", "503", "dropped", "activator gave up", "bad gateway"],
)
def test_what_happens_before_the_answer_begins_is_retried(not_yet: Act, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_cli.retry.FIRST_DELAY_S", 0.01)
    result, server = predict(not_yet, not_yet, predictions("at last"))
    assert (result.exit_code, result.stdout) == (0, "at last\n")
    assert len(server.asked) == 3
    assert len({asked.headers["x-request-id"] for asked in server.asked}) == 1


def test_a_wait_is_told_once_a_reason_on_stderr() -> None:
    result, _ = predict(LOADING, LOADING, BUSY, predictions("at last"))
    waits = [line.split(" (")[0] for line in result.stderr.splitlines()]
    assert waits == ["Waiting: 503: The model is loading.", "Waiting: 429: The queue is full."]


def test_a_server_that_does_not_listen_yet_is_waited_for() -> None:
    server = ScriptedServer([predictions("up")], port=free_port())
    delays: list[float] = []

    def start(delay_s: float) -> None:
        delays.append(delay_s)
        server.__enter__()

    retry = Retry(60, sleep=start)
    with httpx.Client() as http:
        body = b'{"prompt": "hi"}'
        url = f"http://127.0.0.1:{server.port}/v1/models/m:predict"
        response = retry.send(http, lambda _: http.build_request("POST", url, content=body))
        response.close()
    server.__exit__()
    assert response.status_code == 200
    assert len(delays) == 1


def test_delays_grow_and_the_budget_ends_them() -> None:
    now_s, delays = 0.0, []

    def sleep(delay_s: float) -> None:
        nonlocal now_s
        now_s += delay_s
        delays.append(delay_s)

    retry = Retry(30, sleep=sleep, clock=lambda: now_s)
    nobody = f"http://127.0.0.1:{free_port()}"
    with httpx.Client() as http, pytest.raises(GaveUp, match=r"Gave up after 30 s.*Nothing answers at 127"):
        retry.send(http, lambda left_s: http.build_request("GET", nobody, timeout=left_s))
    assert delays[0] < delays[-1] <= 8
    assert sum(delays) <= 30


def test_retry_after_decides_the_pause() -> None:
    delays: list[float] = []
    with ScriptedServer([]) as server, httpx.Client() as http:
        server.pages["/"] = lambda handler: (answer_json({}, 503, retry_after="7") if not delays else answer_json({}))(
            handler
        )
        Retry(60, sleep=delays.append).send(http, lambda _: http.build_request("GET", server.url)).close()
    assert delays == [7]


def test_giving_up_exits_with_4_and_says_what_was_met() -> None:
    result, server = predict(
        answer_json({"error": "Still loading."}, 503, retry_after="60"), args=("hi", "--wait", "5")
    )
    assert result.exit_code == 4
    assert "Gave up after 5 s (--wait). Last error: 503: Still loading." in result.stderr
    assert len(server.asked) == 1


def test_a_silent_server_exits_with_4_when_the_budget_is_spent() -> None:
    never = threading.Event()
    with ScriptedServer([after(never, hang_up)]) as server:
        result = CliRunner().invoke(app, ["predict", "hi", "--url", server.url, "--wait", "1"])
        never.set()
    assert result.exit_code == 4
    assert "in time" in result.stderr


def test_a_late_first_byte_is_no_reason_to_ask_twice() -> None:
    asked = threading.Event()

    def act(handler: object) -> None:
        asked.set()
        after(asked, stream(*WHOLE_STREAM))(handler)  # type: ignore[arg-type]

    result, server = predict(act, args=("hi", "--stream"))
    assert result.stdout == "Hello, wörld\n"
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("url", "sentence"),
    [("http://no-such-host.invalid", "No such host"), ("https://127.0.0.1:{plain}", "No secure connection")],
)
def test_what_no_wait_can_cure_exits_with_5_at_once(url: str, sentence: str) -> None:
    with ScriptedServer([predictions("never asked")]) as server:
        result = CliRunner().invoke(app, ["predict", "hi", "--url", url.format(plain=server.port)])
    assert result.exit_code == 5
    assert sentence in result.stderr


# Refusals


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        (answer_json({"error": "top_p is not.", "code": "bad_request"}, 400), "400: top_p is not."),
        (answer_json({"error": {"message": "No such model."}}, 404), "404: No such model."),
        (answer_json({"detail": "Not Found"}, 404), "404: Not Found"),
        (answer_bytes(b"request timeout", 504), "504: request timeout"),
        (answer_bytes(b"", 500), "500: Internal Server Error"),
        (answer_bytes(b"", 307, location="https://elsewhere/"), "redirects to https://elsewhere/"),
        (answer_json({"outputs": []}), "no predictions"),
    ],
)  # fmt: skip
def test_a_refusal_exits_with_1_and_the_servers_sentence(refusal: Act, sentence: str) -> None:
    result, server = predict(refusal)
    assert (result.exit_code, result.stdout) == (1, "")
    assert sentence in result.stderr
    assert "Traceback" not in result.output
    assert len(server.asked) == 1


def test_an_error_names_the_request_even_when_the_server_did_not() -> None:
    result, server = predict(answer_json({"error": "No."}, 400))
    assert result.stderr == f"Error: 400: No. (request id {server.asked[0].headers['x-request-id']})\n"


# Answers cut short


@pytest.mark.parametrize(
    ("cut", "sentence"),
    [
        (stream(event("Hel"), whole=False), "connection broke"),
        (stream(event("Hel")), "ended before it was complete"),
        (stream(event("Hel"), last_event(1)), "ended before it was complete"),
        (stream(event("Hel"), b"request timeout"), "`timeout` ended the answer"),
        (stream(event("Hel"), b'data: {"te', b"request timeout"), "`timeout` ended the answer"),
        (stream(event("Hel"), error_event("The engine died.")), "The engine died."),
        (stream(event("Hel"), b"data: {oops\n\n", DONE), "not JSON"),
    ],
    ids=["dropped", "no DONE", "only the end", "Knative", "Knative in an event", "error event", "garbage"],
)  # fmt: skip
def test_a_stream_that_is_not_whole_exits_with_3_and_is_not_retried(cut: Act, sentence: str) -> None:
    result, server = predict(cut, args=("hi", "--stream"))
    assert (result.exit_code, result.stdout) == (3, "Hel\n")
    assert sentence in result.stderr
    assert len(server.asked) == 1


def test_what_follows_the_end_marker_does_not_matter() -> None:
    result, _ = predict(stream(*WHOLE_STREAM, b"request timeout"), args=("hi", "--stream"))
    assert result.exit_code == 0


def test_a_cut_json_answer_exits_with_3() -> None:
    result, server = predict(answer_bytes(b'{"predictions": [{"generarequest timeout'))
    assert (result.exit_code, result.stdout) == (3, "")
    assert "`timeout` ended the answer" in result.stderr
    assert len(server.asked) == 1


def test_a_json_answer_to_a_stream_is_refused() -> None:
    result, _ = predict(predictions("no stream"), args=("hi", "--stream"))
    assert result.exit_code == 1
