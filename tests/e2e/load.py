"""Requests to a served model, one or many at a time, and whether each was answered whole."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

LONGEST_ANSWER_S = 300
"""A held request waits for a cold start."""


@dataclass(frozen=True)
class Target:
    """The URL of V1 predict at the ingress gateway, and the host to ask it for."""

    url: str
    host: str


@dataclass(frozen=True)
class Answer:
    text: str
    seconds: float
    failure: str = ""
    """Why the answer is not whole; empty for one that is."""


def ask(target: Target, http: httpx.Client | None = None, **body: Any) -> Answer:
    """Return the answer to one request, `stream` or not. A cut stream is an answer with a failure."""
    body = {"prompt": "How do I install the chart?", "temperature": 0, "max_new_tokens": 16, **body}
    began_s = time.monotonic()
    content = b""
    try:
        with (http or httpx).stream(
            "POST", target.url, json=body, headers={"Host": target.host}, timeout=LONGEST_ANSWER_S
        ) as response:
            for piece in response.iter_raw():
                content += piece
        text, failure = _read(response, content)
    except httpx.HTTPError as error:
        text, failure = content.decode(errors="replace"), repr(error)
    return Answer(text, time.monotonic() - began_s, failure)


def ask_many(target: Target, requests: int, clients: int, **body: Any) -> list[Answer]:
    """Return the answers to so many requests from so many clients at a time."""
    with (
        httpx.Client(limits=httpx.Limits(max_keepalive_connections=clients)) as http,
        ThreadPoolExecutor(clients) as pool,
    ):
        return list(pool.map(lambda _: ask(target, http, **body), range(requests)))


@contextmanager
def under_load(target: Target, clients: int = 4, **body: Any) -> Iterator[list[Answer]]:
    """Clients that ask one request after the other while the block runs; the list is complete after the block."""
    answers: list[Answer] = []
    stopping = threading.Event()

    def client() -> None:
        with httpx.Client() as http:
            while not stopping.is_set():
                answers.append(ask(target, http, **body))

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        try:
            yield answers
        finally:
            stopping.set()
    for future in running:
        future.result()


def failures(answers: Sequence[Answer]) -> list[str]:
    """Return why answers are not whole, after printing what was sent and what was lost."""
    lost = [answer.failure for answer in answers if answer.failure]
    longest_s = max((answer.seconds for answer in answers), default=0)
    print(f"{len(answers)} requests, {len(lost)} lost, the longest took {longest_s:.1f} s")
    return lost


def _read(response: httpx.Response, content: bytes) -> tuple[str, str]:
    """Return the text and why it is not whole."""
    body = content.decode(errors="replace")
    if response.status_code != 200:
        return body, f"{response.status_code}: {body[:200]}"
    content_type = response.headers.get("content-type", "")
    if content_type.startswith("text/event-stream"):
        events = body.split("\n\n")
        if events[-2:] != ["data: [DONE]", ""]:
            return body, f"the stream ended without [DONE]: ...{body[-200:]}"
        return "".join(json.loads(event.removeprefix("data: "))["text"] for event in events[:-2]), ""
    if not content_type.startswith("application/json"):
        return body, f"200 with the content type {content_type!r}: {body[:200]}"
    return httpx.Response(200, content=content).json()["predictions"][0]["generated_text"], ""
