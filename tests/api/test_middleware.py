"""What wraps the routes: a model that plays a script behind, httpx in front, a socket where it matters."""

import asyncio
import json

import httpx
import pytest
from prometheus_client import REGISTRY

from model_server import errors
from tests.support.scripted_model import PREDICT, ScriptedModel, ask, over_a_socket


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel()


def count(outcome: str, route: str = "predict") -> float:
    labels = {"route": route, "outcome": outcome}
    return REGISTRY.get_sample_value("mistral_requests_total", labels) or 0.0


def every_error() -> list[type[errors.ServeError]]:
    classes = [errors.ServeError]
    for cls in classes:
        classes += cls.__subclasses__()
    return classes


def test_whole_answer_is_json(model):
    answer = ask(model, "POST", PREDICT, json={"prompt": "é 🙂"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"predictions": [{"prompt": "é 🙂"}]}


def test_stream_is_events_that_nobody_may_cache_or_hold_back(model):
    model.chunks = [b'data: {"text": "a"}\n\n', b"data: [DONE]\n\n"]
    answer = ask(model, "POST", PREDICT, json={"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.content == b"".join(model.chunks)


def test_stream_is_text_for_who_accepts_text(model):
    model.chunks = ["né".encode()]
    headers = {"Accept": "text/plain;q=0.9"}
    answer = ask(model, "POST", PREDICT, json={"stream": True}, headers=headers)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text == "né"


def test_each_chunk_arrives_before_the_next_is_made(model):
    model.chunks, model.hang = [b"data: 1\n\n"], True

    async def first_chunk(client):
        async with client.stream("POST", PREDICT, json={"stream": True}) as answer:
            return await anext(answer.aiter_raw())

    assert over_a_socket(model, first_chunk) == b"data: 1\n\n"


def test_request_id_of_the_caller_goes_in_and_comes_out(model):
    headers = {"X-Request-Id": "abc-1.2:3_4"}
    answer = ask(model, "POST", PREDICT, json={}, headers=headers)
    assert answer.headers["x-request-id"] == model.headers["x-request-id"] == "abc-1.2:3_4"


@pytest.mark.parametrize("sent", ["", "a b", "é".encode(), "x" * 129, "a\tb"])
def test_request_id_that_could_harm_a_log_is_replaced(model, sent):
    headers = {"X-Request-Id": sent}
    answer = ask(model, "POST", PREDICT, json={}, headers=headers)
    assert len(answer.headers["x-request-id"]) == 32
    assert model.headers["x-request-id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)
def test_every_error_reaches_the_client_before_a_stream(model, cls):
    model.error = cls("Something \ud800 is so.")
    answer = ask(model, "POST", PREDICT, json={})
    assert answer.status_code == cls.status
    assert answer.json() == {"error": "Something \ud800 is so.", "code": cls.code}
    assert ("retry-after" in answer.headers) == (cls.status == 503)
    assert ("www-authenticate" in answer.headers) == (cls.status == 401)


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)
def test_every_error_reaches_the_client_within_a_stream(model, cls):
    model.chunks = [b"data: 1\n\n", cls("No more.")]
    before = count(cls.code)
    answer = ask(model, "POST", PREDICT, json={"stream": True})
    data = json.dumps({"error": "No more.", "code": cls.code})
    assert answer.text == f"data: 1\n\nevent: error\ndata: {data}\n\n"
    assert count(cls.code) == before + 1


def test_failure_within_bare_text_breaks_the_connection(model):
    model.chunks = [b"half of", errors.OutOfMemory("No more.")]
    headers = {"Accept": "text/plain"}
    with pytest.raises(httpx.RemoteProtocolError):
        over_a_socket(model, lambda client: client.post(PREDICT, json={"stream": True}, headers=headers))


def test_wait_that_is_known_is_told(model):
    model.error = errors.QueueFull("Full.", retry_after_s=7)
    answer = ask(model, "POST", PREDICT, json={})
    assert answer.headers["retry-after"] == "7"


def test_unforeseen_exception_is_a_500_without_internals_and_a_traceback_in_the_log(model, caplog):
    model.error = ZeroDivisionError("secret detail")
    answer = ask(model, "POST", PREDICT, json={})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "secret detail" not in answer.text
    assert "Traceback" in caplog.text
    assert "secret detail" in caplog.text


def test_mistake_of_a_client_is_logged_without_traceback_or_words_of_the_request(model, caplog):
    caplog.set_level("INFO")
    model.error = errors.BadRequest("top_k must not be 'my secret'.", field="top_k")
    ask(model, "POST", PREDICT, json={}, headers={"X-Request-Id": "r1"})
    assert "r1 answered 400 bad_request (field 'top_k')" in caplog.text
    assert "Traceback" not in caplog.text
    assert "my secret" not in caplog.text


def test_body_that_says_it_is_too_large_is_refused(model):
    answer = ask(model, "POST", PREDICT, content=b" " * 1001)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert "1000 bytes" in answer.json()["error"]


def test_body_that_turns_out_too_large_is_refused(model):
    async def chunks():
        for _ in range(11):
            yield b" " * 100

    answer = ask(model, "POST", PREDICT, content=chunks())
    assert answer.status_code == 413
    assert not model.called.is_set()


def test_body_of_the_largest_size_is_taken(model):
    body = b'{"prompt": "%s"}' % (b"x" * 986)
    answer = ask(model, "POST", PREDICT, content=body[:-2].ljust(998) + b'"}')
    assert answer.status_code == 200


def test_body_that_is_no_json_is_refused(model):
    answer = ask(model, "POST", PREDICT, content=b"{")
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_cancels_its_work(model, stream):
    model.hang, model.chunks = True, [b"data: 1\n\n"]
    before = count("cancelled")

    async def leave(client):
        call = asyncio.create_task(client.post(PREDICT, json={"stream": stream}))
        await model.called.wait()
        call.cancel()
        await asyncio.wait_for(model.left.wait(), 5)

    over_a_socket(model, leave)
    assert count("cancelled") == before + 1


def test_client_that_stops_reading_is_given_up(model):
    model.chunks = [b"data: %s\n\n" % (b"x" * 2**20)] * 64
    before = count("cancelled")

    async def stop_reading(client):
        async with client.stream("POST", PREDICT, json={"stream": True}):
            await asyncio.wait_for(model.left.wait(), 5)

    over_a_socket(model, stop_reading, client_stall_s=0.2)
    assert count("cancelled") == before + 1


def test_answers_are_counted_by_route_and_outcome(model):
    before = count("ok")
    ask(model, "POST", PREDICT, json={})
    assert count("ok") == before + 1


def test_path_made_up_by_a_caller_is_no_label(model):
    before = count("not_found", route="none")
    ask(model, "POST", "/made/up", json={})
    assert count("not_found", route="none") == before + 1
