"""Helpers for the relay over HTTP: requests, answers of the server behind it, and a receiver of its webhooks."""

from __future__ import annotations

import time
from typing import Any

import httpx
from standardwebhooks import Webhook
from starlette.testclient import TestClient

from tests.support.scripted_server import answer_json

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OK = answer_json("the answer")
BUSY = answer_json({"error": "The queue is full.", "code": "queue_full"}, 429, retry_after="0")
FAULT = answer_json({"error": "The server failed.", "code": "internal"}, 500)
REFUSED = answer_json({"error": "prompt is missing.", "code": "bad_request"}, 400)
FAST = {"max_attempts": 3, "initial_delay_ms": 0, "max_delay_ms": 0}


class Receiver(httpx.AsyncBaseTransport):
    """Receives webhooks: verifies each signature and answers with a script of statuses."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses) or [204]
        self.received: list[Any] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        content = Webhook(SECRET).verify(request.content, dict(request.headers))
        self.received.append((str(request.url), request.headers["webhook-id"], content))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return httpx.Response(status, headers={"location": "https://elsewhere.example.com/"})


def ask(client: TestClient, path: str = "/production/async_predict", **body: Any) -> httpx.Response:
    return client.post(path, json={"model_input": {"prompt": "hi"}, "inference_retry_config": FAST} | body)


def ended(client: TestClient, request_id: str, webhook: bool = False) -> dict[str, Any]:
    """Wait until a request, and with `webhook` its webhook, has ended; return the relay's description of it."""
    for _ in range(1000):
        shown = client.get(f"/async_request/{request_id}").json()
        if shown["status"] not in ("QUEUED", "IN_PROGRESS") and not (webhook and shown["webhook_status"] == "PENDING"):
            return shown
        time.sleep(0.01)
    raise AssertionError(shown)
