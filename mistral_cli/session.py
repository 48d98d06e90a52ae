"""The connection of one command to one server: sends a request with retries, returns a response that has begun."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import httpx

from . import answer
from .endpoint import Endpoint
from .retry import CONNECT_S, Retry


class Session:
    """One HTTP client, one endpoint and one retry budget for all requests of a command."""

    def __init__(self, http: httpx.Client, endpoint: Endpoint, retry: Retry) -> None:
        self._http, self._endpoint, self._retry = http, endpoint, retry

    @contextmanager
    def open(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Iterator[httpx.Response]:
        """Yield a response that has begun; leaving the block closes the connection, which cancels the generation.

        Raises:
            Failure: the server refused, gave no answer in time, or cannot be reached.
        """

        def request(remaining_s: float) -> httpx.Request:
            return self._http.build_request(
                method,
                self._endpoint.url(path),
                content=None if body is None else json.dumps(body).encode(),
                headers={"Content-Type": "application/json", **self._endpoint.headers},
                timeout=httpx.Timeout(remaining_s, connect=min(CONNECT_S, remaining_s)),
                extensions=dict(self._endpoint.extensions),
            )

        with closing(self._retry.send(self._http, request)) as response:
            answer.check(response)
            yield response
