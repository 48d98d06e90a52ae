"""Reads a response: the whole text, its pieces, or the server's reason for refusing.

A stream is whole only when it ends with `[DONE]`. Its end alone proves nothing: Knative ends a stream at its
timeout with status 200, a clean close and the words `request timeout` behind the last event.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from httpx_sse import EventSource

from .exit_codes import Incomplete, Refused

MAX_SENTENCE_CHARS = 600
"""Characters shown of an error body that is not JSON: a proxy's page can be long."""
TAIL_CHARS = 64
"""Characters kept of a stream's end; the longest text to search for is `request timeout`."""


def check(response: httpx.Response) -> None:
    """Raise `Refused` with the server's reason unless the status is 200."""
    if response.status_code != 200:
        raise Refused(refusal(response))


def whole(response: httpx.Response) -> Any:
    """Read a JSON answer to its end."""
    try:
        return json.loads(response.read())
    except httpx.RequestError as error:
        raise Incomplete(_named("The connection broke in the middle of the answer.", response)) from error
    except ValueError as error:
        raise Incomplete(_named(_cut_sentence(response.text), response)) from error


def pieces(response: httpx.Response) -> Iterator[Mapping[str, Any]]:
    """Yield the data of a stream's events as they arrive; returns only after `[DONE]`."""
    if response.headers.get("content-type", "").partition(";")[0] != "text/event-stream":
        raise Refused(
            _named(
                "The answer is not a stream, although the request asked for one: is this the right server?", response
            )
        )
    body = _Body(response)
    try:
        for event in EventSource(body).iter_sse():
            if event.event == "error":
                raise Incomplete(_named(_sentence(event.data) or "The server failed in the middle.", response))
            if event.data == "[DONE]":
                return
            if event.data:
                yield json.loads(event.data)
    except httpx.RequestError as error:
        raise Incomplete(_named("The connection broke in the middle of the answer.", response)) from error
    except ValueError as error:
        raise Incomplete(_named("An event of the stream is not JSON.", response)) from error
    raise Incomplete(_named(_cut_sentence(body.tail), response))


class _Body(httpx.Response):
    """A streamed response that remembers its last characters: no event holds the words after the last event."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(response.status_code, headers=response.headers, request=response.request)
        self._response = response
        self.tail = ""

    def iter_text(self, chunk_size: int | None = None) -> Iterator[str]:
        for text in self._response.iter_text(chunk_size):
            self.tail = (self.tail + text)[-TAIL_CHARS:]
            yield text


def text(piece: Mapping[str, Any]) -> str:
    """Return what one event adds to the text."""
    return str(piece.get("text", ""))


def texts(content: Any) -> list[str]:
    """Return the texts of a whole answer, in the order they were asked for."""
    try:
        return [str(prediction["generated_text"]) for prediction in content["predictions"]]
    except (KeyError, TypeError) as error:
        raise Refused("The answer has no predictions: is this the right server? (--json prints it)") from error


def refusal(response: httpx.Response) -> str:
    """Return the sentence of an error response, with the request id of the server's log."""
    try:
        response.read()
    except httpx.RequestError:
        return _named(f"{response.status_code} {response.reason_phrase}, and the connection broke.", response)
    sentence = _sentence(response.text) or response.reason_phrase
    if location := response.headers.get("location"):
        sentence = f"The server redirects to {location}; use that as --url."
    return _named(f"{response.status_code}: {sentence}", response)


def _cut_sentence(tail: str) -> str:
    if tail.rstrip().endswith("request timeout"):
        return "The InferenceService's `timeout` ended the answer before it was complete."
    return "The answer ended before it was complete."


def _sentence(body: str) -> str:
    """Return the error message of a body in this server's, OpenAI's or FastAPI's form, or a proxy's text."""
    try:
        parsed = json.loads(body)
    except ValueError:
        return body.strip()[:MAX_SENTENCE_CHARS]
    error = parsed.get("error", parsed.get("detail")) if isinstance(parsed, dict) else parsed
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else body.strip()[:MAX_SENTENCE_CHARS]


def _named(sentence: str, response: httpx.Response) -> str:
    request_id = response.headers.get("x-request-id") or response.request.headers.get("x-request-id")
    return f"{sentence} (request id {request_id})" if request_id else sentence
