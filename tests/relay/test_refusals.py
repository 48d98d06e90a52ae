"""A request that the relay does not accept is refused with its reason."""

from __future__ import annotations

import pytest

from tests.support.relay import BUSY, OK, ask


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


def test_a_full_queue_refuses_and_says_when_to_try_again(serve, monkeypatch):
    client = serve(BUSY, max_queue_size=1)
    monkeypatch.setattr(client.app.state.store, "claim", lambda: None)
    ask(client)
    ask(client)  # the first one, if the worker had begun to claim before

    full = ask(client)

    assert (full.status_code, full.json()["code"], "retry-after" in full.headers) == (429, "queue_full", True)


def test_a_body_above_the_limit_is_refused(serve):
    assert ask(serve(OK, max_request_bytes=1024), model_input={"prompt": "x" * 2000}).status_code == 413


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_unknown_id_is_not_found(serve, method):
    assert serve(OK).request(method, "/async_request/none").status_code == 404


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
