"""The relay over real HTTP: what it accepts is answered under one id, whatever happens in between."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook
from starlette.testclient import TestClient

from mistral_relay import webhooks, worker
from mistral_relay.app import create_app
from mistral_relay.settings import Settings, SettingsError
from mistral_relay.store import Store
from tests.support.scripted_server import Act, ScriptedServer, answer_json, hang_up
from tests.support.server_process import free_port

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OK = answer_json("the answer")
BUSY = answer_json({"error": "The queue is full.", "code": "queue_full"}, 429, retry_after="0")
FAULT = answer_json({"error": "The server failed.", "code": "internal"}, 500)
REFUSED = answer_json({"error": "prompt is missing.", "code": "bad_request"}, 400)
FAST = {"max_attempts": 3, "initial_delay_ms": 0, "max_delay_ms": 0}


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "POLL_S", 0.01)
    monkeypatch.setattr(worker, "RETRY_LATER_S", 0.01)
    monkeypatch.setattr(webhooks, "delay_s", lambda attempt: 0.01)


class Receiver(httpx.AsyncBaseTransport):
    """Stands where webhooks arrive: verifies each signature and answers with a script of statuses."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses) or [204]
        self.received: list[Any] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        content = Webhook(SECRET).verify(request.content, dict(request.headers))
        self.received.append((str(request.url), request.headers["webhook-id"], content))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return httpx.Response(status, headers={"location": "https://elsewhere.example.com/"})


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """A factory of relays in front of a server that plays acts; all share one database."""
    opened: list[Any] = []

    def make(*acts: Act, receiver: Receiver | None = None, **changes: Any) -> TestClient:
        server = ScriptedServer(list(acts)).__enter__()
        opened.append(server)
        (tmp_path / "secret").write_text(SECRET)
        settings = Settings(
            upstream_url=server.url, database=tmp_path / "relay.sqlite", webhook_hosts=("hooks.example.com",),
            webhook_secret_file=tmp_path / "secret", **changes,
        )  # fmt: skip
        client = TestClient(create_app(settings, transport=receiver or Receiver())).__enter__()
        client.upstream = server  # type: ignore[attr-defined]
        opened.append(client)
        return client

    yield make
    for thing in reversed(opened):
        thing.__exit__(None, None, None)


def ask(client: TestClient, path: str = "/production/async_predict", **body: Any) -> httpx.Response:
    return client.post(path, json={"model_input": {"prompt": "hi"}, "inference_retry_config": FAST} | body)


def ended(client: TestClient, request_id: str, webhook: bool = False) -> dict[str, Any]:
    """Wait until a request has ended, and its webhook if asked; return what the relay says of it."""
    for _ in range(1000):
        shown = client.get(f"/async_request/{request_id}").json()
        if shown["status"] not in ("QUEUED", "IN_PROGRESS") and not (webhook and shown["webhook_status"] == "PENDING"):
            return shown
        time.sleep(0.01)
    raise AssertionError(shown)


@pytest.mark.parametrize("prefix", ["", "/production", "/development", "/environments/staging", "/deployment/abc"])
def test_an_accepted_request_is_sent_to_the_predict_path_and_its_answer_kept(serve, prefix):
    client = serve(OK)

    response = ask(client, f"{prefix}/async_predict")

    request_id = response.json()["request_id"]
    shown = ended(client, request_id)
    [asked] = client.upstream.asked
    assert response.status_code == 201
    assert (shown["status"], shown["data"], shown["webhook_status"]) == (
        "SUCCEEDED",
        "the answer",
        "NO_WEBHOOK_PROVIDED",
    )
    assert (asked.path, asked.body, asked.headers["x-request-id"]) == (
        f"{prefix}/predict",
        {"prompt": "hi"},
        request_id,
    )


def test_the_answer_goes_to_the_webhook_signed_under_the_requests_id(serve):
    receiver = Receiver(500, 204)
    client = serve(OK, receiver=receiver)

    request_id = ask(client, webhook_endpoint="https://hooks.example.com/a?b=c").json()["request_id"]

    assert ended(client, request_id, webhook=True)["webhook_status"] == "SUCCEEDED"
    url, webhook_id, content = receiver.received[-1]
    assert (url, webhook_id, len(receiver.received)) == ("https://hooks.example.com/a?b=c", request_id, 2)
    assert content["request_id"] == request_id
    assert (content["type"], content["data"], content["errors"]) == ("async_request_completed", "the answer", [])


def test_a_webhook_that_never_succeeds_is_given_up_and_the_answer_stays(serve):
    receiver = Receiver(302)
    client = serve(OK, receiver=receiver)

    shown = ended(client, ask(client, webhook_endpoint="https://hooks.example.com/").json()["request_id"], webhook=True)

    assert (shown["status"], shown["webhook_status"], shown["data"]) == ("SUCCEEDED", "FAILED", "the answer")
    assert {url for url, _, _ in receiver.received} == {"https://hooks.example.com/"}
    assert len(receiver.received) == webhooks.MAX_ATTEMPTS


@pytest.mark.parametrize(
    ("acts", "calls", "status", "code"),
    [
        ((REFUSED,), 1, "FAILED", "bad_request"),
        ((FAULT,), 3, "FAILED", "internal"),
        ((hang_up,), 3, "FAILED", "broken_connection"),
        ((FAULT, OK), 2, "SUCCEEDED", None),
        ((BUSY, BUSY, BUSY, BUSY, OK), 5, "SUCCEEDED", None),
    ],
)
def test_a_fault_is_retried_as_asked_and_a_refusal_for_now_is_not_an_attempt(serve, acts, calls, status, code):
    client = serve(*acts)

    shown = ended(client, ask(client).json()["request_id"])

    assert shown["status"] == status
    assert [error["code"] for error in shown["errors"]] == ([code] if code else [])
    assert len(client.upstream.asked) == calls


def test_a_request_that_waits_too_long_expires(serve, monkeypatch):
    client = serve(BUSY)
    request_id = ask(client, max_time_in_queue_seconds=10).json()["request_id"]

    client.app.state.store._start_s -= 11  # eleven seconds of the queue's clock

    assert ended(client, request_id)["status"] == "EXPIRED"


def test_a_jump_of_the_systems_clock_expires_nothing(serve, monkeypatch):
    client = serve(BUSY, BUSY, BUSY, BUSY, OK)
    request_id = ask(client, max_time_in_queue_seconds=10).json()["request_id"]
    monkeypatch.setattr(time, "time", lambda: 4e9)

    assert ended(client, request_id)["status"] == "SUCCEEDED"


def test_a_request_that_waits_can_be_canceled_and_calls_no_webhook(serve):
    receiver = Receiver()
    client = serve(BUSY, receiver=receiver, concurrency=1)
    request_id = ask(client, webhook_endpoint="https://hooks.example.com/").json()["request_id"]
    while not client.delete(f"/async_request/{request_id}").json()["canceled"]:
        pass

    shown = client.get(f"/async_request/{request_id}").json()

    assert (shown["status"], shown["webhook_status"], receiver.received) == ("CANCELED", "CANCELED", [])
    assert client.delete(f"/async_request/{request_id}").json()["canceled"] is False


def test_a_lower_priority_number_goes_first_and_then_the_oldest(tmp_path):
    store = Store(tmp_path / "queue.sqlite", max_queue_size=10)
    ids = {
        name: store.add("/", name, priority=priority, max_time_in_queue_s=99, webhook=None, retry=FAST)
        for name, priority in (("late", 2), ("first", 0), ("middle", 1), ("second", 0))
    }

    claimed = [record.id for record in iter(store.claim, None)]

    store.close()
    assert claimed == [ids["first"], ids["second"], ids["middle"], ids["late"]]


def test_the_same_idempotency_key_gets_the_same_id(serve):
    client = serve(OK)
    headers = {"Idempotency-Key": "order-1"}
    body = {"model_input": {"prompt": "hi"}}

    first, second = (client.post("/async_predict", json=body, headers=headers).json() for _ in range(2))
    other = client.post("/async_predict", json={"model_input": {"prompt": "ho"}}, headers=headers)

    assert first == second
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    ended(client, first["request_id"])
    assert len(client.upstream.asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/", "https://evil.example.com/", "https://hooks.example.com.evil.com/",
        "https://hooks.example.com@evil.com/", "https://user@hooks.example.com/", "https://hooks.example.com:8443/",
        "https://127.0.0.1/", "https://[::1]/", "https://169.254.169.254/latest/meta-data", "https://2130706433/",
        "https://evil.com\\@hooks.example.com/", "https://evil.com#@hooks.example.com/", "https://hooks.example.com:x/",
        "file:///etc/passwd", "gopher://hooks.example.com/", "//hooks.example.com/", "hooks.example.com", "",
        "https://hooks.example.com/\r\nHost: evil.com", "https://hooks.еxample.com/", "https://[", "https:///hooks.example.com",
    ],
)  # fmt: skip
def test_a_webhook_to_any_other_place_is_refused(serve, url):
    response = ask(serve(OK), webhook_endpoint=url)

    assert (response.status_code, response.json()["code"]) == (400, "bad_request")
    assert response.json()["error"].startswith("webhook_endpoint")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"model_input": "hi"}, "model_input"),
        ({"model_input": {"stream": True}}, "model_input.stream"),
        ({"priority": 3}, "priority"),
        ({"priority": True}, "priority"),
        ({"max_time_in_queue_seconds": 9}, "max_time_in_queue_seconds"),
        ({"max_time_in_queue_seconds": 259_201}, "max_time_in_queue_seconds"),
        ({"inference_retry_config": {"max_attempts": 0}}, "inference_retry_config.max_attempts"),
        ({"webhok_endpoint": "x"}, "webhok_endpoint"),
    ],
)
def test_a_wrong_body_is_refused_by_its_field(serve, body, field):
    response = ask(serve(OK), **body)

    assert response.status_code == 400
    assert response.json()["error"].startswith(field)


def test_a_large_body_a_full_queue_and_a_missing_id_are_refused(serve, monkeypatch):
    client = serve(BUSY, max_request_bytes=1024, max_queue_size=1)
    monkeypatch.setattr(client.app.state.store, "claim", lambda: None)
    ask(client)
    ask(client)  # the first one, if the worker had begun to claim before

    full = ask(client)

    assert (full.status_code, full.json()["code"], "retry-after" in full.headers) == (429, "queue_full", True)
    assert ask(client, model_input={"prompt": "x" * 2000}).status_code == 413
    assert client.get("/async_request/none").status_code == client.delete("/async_request/none").status_code == 404


def test_without_a_key_of_the_file_nothing_but_health_and_metrics_answers(serve, tmp_path):
    (tmp_path / "keys").write_text("secret-key\n")
    client = serve(OK, api_key_file=tmp_path / "keys")

    refused = ask(client)
    accepted = client.post("/async_predict", json={"model_input": {}}, headers={"Authorization": "Api-Key secret-key"})

    assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    assert client.get("/async_request/x").status_code == 401
    assert accepted.status_code == 201
    assert client.get("/health").status_code == 200
    assert 'mistral_relay_requests{status="QUEUED"}' in client.get("/metrics").text


def test_a_full_disk_refuses_and_keeps_what_was_accepted(serve):
    client = serve(OK)
    known = ask(client).json()["request_id"]
    ended(client, known)
    store = client.app.state.store
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count={pages}")

    statuses = {ask(client, model_input={"prompt": "x" * 100_000}).status_code for _ in range(3)}

    store._db.execute("PRAGMA max_page_count=1000000")
    assert statuses == {503}
    assert client.get(f"/async_request/{known}").json()["status"] == "SUCCEEDED"
    assert ask(client).status_code == 201


def test_a_finished_request_is_deleted_after_its_retention(serve):
    client = serve(OK, retention_s=0)
    request_id = ask(client).json()["request_id"]

    while client.get(f"/async_request/{request_id}").status_code != 404:
        pass

    assert len(client.upstream.asked) == 1


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({}, "MISTRAL_RELAY_UPSTREAM_URL is missing"),
        ({"MISTRAL_RELAY_UPSTREAM_URL": "ftp://x"}, "must be an http or https URL"),
        ({"MISTRAL_RELAY_PORTS": "1"}, "MISTRAL_RELAY_PORTS is not a setting"),
        ({"MISTRAL_RELAY_UPSTREAM_URL": "http://x", "MISTRAL_RELAY_PORT": "0"}, "must be an integer from 1 to 65535"),
        ({"MISTRAL_RELAY_UPSTREAM_URL": "http://x", "MISTRAL_RELAY_WEBHOOK_HOSTS": "https://a"}, "is not a host name"),
        ({"MISTRAL_RELAY_UPSTREAM_URL": "http://x", "MISTRAL_RELAY_WEBHOOK_HOSTS": "a.b"}, "webhooks are signed"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_a_sentence(environ, part):
    with pytest.raises(SettingsError, match=part.replace(".", r"\.")):
        Settings.from_environ(environ)


def test_killed_at_any_moment_every_accepted_request_is_answered_under_its_id(tmp_path):
    chance, accepted = random.Random(3), []
    port = free_port()
    with ScriptedServer([OK]) as upstream, httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        environ = {
            **os.environ, "PYTHONPATH": os.getcwd(), "MISTRAL_RELAY_UPSTREAM_URL": upstream.url,
            "MISTRAL_RELAY_DATABASE": str(tmp_path / "relay.sqlite"), "MISTRAL_RELAY_PORT": str(port),
        }  # fmt: skip
        for _ in range(4):
            process = subprocess.Popen([sys.executable, "-m", "mistral_relay"], env=environ, stderr=subprocess.DEVNULL)
            for _ in range(chance.randint(3, 12)):
                accepted.append(_accept(http, process))
            process.send_signal(signal.SIGKILL)
            process.wait()
        process = subprocess.Popen([sys.executable, "-m", "mistral_relay"], env=environ, stderr=subprocess.DEVNULL)
        accepted.append(_accept(http, process))
        shown = [ended(http, request_id) for request_id in accepted]  # type: ignore[arg-type]
        process.terminate()
        process.wait(30)
        ids = {asked.headers["x-request-id"] for asked in upstream.asked}

    assert {one["status"] for one in shown} == {"SUCCEEDED"}
    assert ids == set(accepted)
    with sqlite3.connect(tmp_path / "relay.sqlite") as db:
        assert db.execute("SELECT count(*) FROM requests").fetchone() == (len(accepted),)
    db.close()


def _accept(http: httpx.Client, process: subprocess.Popen[bytes]) -> str:
    """Send one request, waiting for the relay to listen; return its id."""
    while True:
        assert process.poll() is None
        try:
            response = http.post("/async_predict", content=json.dumps({"model_input": {"prompt": "hi"}}))
        except httpx.TransportError:
            time.sleep(0.02)
        else:
            assert response.status_code == 201, response.text
            return str(response.json()["request_id"])
