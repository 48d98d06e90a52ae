"""The answer goes to a permitted webhook, signed, and to no other place."""

from __future__ import annotations

import pytest

from mistral_relay import webhooks
from tests.support.relay import OK, Receiver, ask, ended


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
