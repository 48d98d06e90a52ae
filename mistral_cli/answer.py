"""What a response says: its text, all of it or in pieces, or the server's reason for having none.

A stream is whole only when it ends with `[DONE]`. Its end alone proves nothing: Knative ends a stream at its
timeout with status 200, a clean close and the words `request timeout` behind the last event.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from .failures import Incomplete, Refused
from .sse import EventStream

LONGEST_SENTENCE = 600
"""Characters of an error body worth showing when it is not ours: a proxy's page can be long."""


def check(response: httpx.Response) -> None:
    """Raise the server's reason, unless it took the request."""
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
    """Yield the data of a stream's events as they come, and return only if the stream was whole."""
    if response.headers.get("content-type", "").partition(";")[0] != "text/event-stream":
        raise Refused(_named("A stream was asked for and the answer is not one: is this the right server?", response))
    stream = EventStream(response.iter_bytes())
    try:
        for event in stream:
            if event.name == "error":
                raise Incomplete(_named(_sentence(event.data) or "The server failed in the middle.", response))
            if event.data == "[DONE]":
                return
            yield json.loads(event.data)
    except httpx.RequestError as error:
        raise Incomplete(_named("The connection broke in the middle of the answer.", response)) from error
    except ValueError as error:
        raise Incomplete(_named("The stream holds an event that is not JSON.", response)) from error
    raise Incomplete(_named(_cut_sentence(stream.rest), response))


def text(piece: Mapping[str, Any]) -> str:
    """Return what one event adds to the text."""
    return str(piece.get("text", ""))


def texts(got: Any) -> list[str]:
    """Return the texts of a whole answer, in the order they were asked for."""
    try:
        return [str(prediction["generated_text"]) for prediction in got["predictions"]]
    except (KeyError, TypeError) as error:
        raise Refused("The answer holds no predictions: is this the right server? (--json shows it)") from error


def refusal(response: httpx.Response) -> str:
    """Return the sentence of an error response, with what finds it in the server's log."""
    try:
        response.read()
    except httpx.RequestError:
        return _named(f"{response.status_code} {response.reason_phrase}, and the connection broke.", response)
    said = _sentence(response.text) or response.reason_phrase
    if location := response.headers.get("location"):
        said = f"The server redirects to {location}; use that as --url."
    return _named(f"{response.status_code}: {said}", response)


def _cut_sentence(rest: str) -> str:
    if rest.rstrip().endswith("request timeout"):
        return "The InferenceService's `timeout` ended the answer before it was whole."
    return "The answer ended before it was whole."


def _sentence(body: str) -> str:
    """Find the sentence in an error body: ours, OpenAI's, FastAPI's, or the bare text of a proxy."""
    try:
        parsed = json.loads(body)
    except ValueError:
        return body.strip()[:LONGEST_SENTENCE]
    error = parsed.get("error", parsed.get("detail")) if isinstance(parsed, dict) else parsed
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else body.strip()[:LONGEST_SENTENCE]


def _named(sentence: str, response: httpx.Response) -> str:
    request_id = response.headers.get("x-request-id") or response.request.headers.get("x-request-id")
    return f"{sentence} (request id {request_id})" if request_id else sentence
