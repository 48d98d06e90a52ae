"""An accepted request is sent to the predict path, retried as asked, and ends under its id."""

from __future__ import annotations

import time

import pytest

from mistral_relay.store import Store
from tests.support.relay import BUSY, FAST, FAULT, OK, REFUSED, Receiver, ask, ended
from tests.support.scripted_server import answer_bytes, hang_up


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


@pytest.mark.parametrize(
    ("acts", "calls", "status", "code"),
    [
        ((REFUSED,), 1, "FAILED", "bad_request"),
        ((FAULT,), 3, "FAILED", "internal"),
        ((hang_up,), 3, "FAILED", "broken_connection"),
        ((answer_bytes(b"", 200),), 3, "FAILED", "broken_answer"),
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
