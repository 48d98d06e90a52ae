"""Runs a batch: reads requests, sends them as many at once as the server can handle, writes each result once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from mistral_cli import retry
from mistral_cli.answer import refusal
from mistral_cli.batch.concurrency import AdaptiveLimit
from mistral_cli.batch.requests import BatchRequest, InvalidLine
from mistral_cli.batch.results import Results
from mistral_cli.endpoint import Endpoint
from mistral_cli.exit_codes import GaveUp
from mistral_cli.retry import CONNECT_S, MAX_DELAY_S, MIN_DELAY_S, TooEarly, is_early, retry_after_s, translate

MAX_ATTEMPTS = 5
"""Attempts at a request that the server answers with a 5xx or breaks off, before it counts as failed."""


@dataclass
class Progress:
    """The counts of one run, for the terminal."""

    num_read: int = 0
    num_skipped: int = 0
    """Lines whose result an earlier run has written."""
    num_repeated: int = 0
    """Lines that repeat the custom_id of an earlier line of the same input."""
    num_finished: int = 0
    num_tokens: int = 0
    limit: int = 0
    notice: str = ""
    """The last reason for a wait; empty while answers come."""
    changed: Callable[[], None] = field(default=lambda: None, repr=False)


class Runner:
    """One batch against one server."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        endpoint: Endpoint,
        limit: AdaptiveLimit,
        progress: Progress,
        *,
        wait_s: float,
        request_timeout_s: float,
    ) -> None:
        self._http, self._endpoint, self._limit, self._progress = http, endpoint, limit, progress
        self._wait_s, self._request_timeout_s = wait_s, request_timeout_s
        self._last_answer_s = time.monotonic()

    async def run(self, lines: Iterator[BatchRequest | InvalidLine], results: Results) -> None:
        """Send every request that has no result yet.

        Raises:
            GaveUp: the server answered no request for `wait_s`; the next run continues.
            Unreachable: a retry cannot help.
        """
        async with anyio.create_task_group() as group:
            for line in lines:
                self._progress.num_read += 1
                if not self._is_wanted(line, results):
                    await anyio.sleep(0)
                    continue
                if isinstance(line, InvalidLine):
                    results.write_error(line.custom_id, "invalid_line", f"Line {line.line}: {line.reason}.")
                    self._finished(0)
                    continue
                started_s = await self._limit.acquire()
                group.start_soon(self._answer, line, results, started_s)

    def _is_wanted(self, line: BatchRequest | InvalidLine, results: Results) -> bool:
        if line.custom_id is None:
            return True
        if not results.is_new(line.custom_id):
            self._progress.num_repeated += 1
        elif results.is_done(line.custom_id):
            self._progress.num_skipped += 1
        else:
            return True
        self._progress.changed()
        return False

    async def _answer(self, request: BatchRequest, results: Results, started_s: float) -> None:
        """Send one request until it has a result. It counts as in flight throughout."""
        num_tokens: int | None = None
        try:
            for attempt in range(1, MAX_ATTEMPTS + 1):
                response = await self._begun(request, started_s)
                try:
                    content = await self._read(response)
                except httpx.TransportError as error:
                    failure = f"The connection broke in the middle of the answer: {error or type(error).__name__}."
                else:
                    if response.status_code < 500 or attempt == MAX_ATTEMPTS:
                        request_id = response.headers.get("x-request-id")
                        results.write_answer(request.custom_id, response.status_code, request_id, content)
                        num_tokens = _num_tokens(content)
                        return
                    failure = refusal(response)
                self._wait(failure)
                await anyio.sleep(min(retry.FIRST_DELAY_S * 2**attempt, MAX_DELAY_S))
            results.write_error(request.custom_id, "broken_connection", failure)
        finally:
            self._limit.release(num_tokens)
            self._progress.limit = self._limit.limit
            self._finished(num_tokens or 0)

    async def _begun(self, request: BatchRequest, started_s: float) -> httpx.Response:
        """Return a response that has begun; wait through a full queue and a cold start."""
        delay_s = retry.FIRST_DELAY_S
        while True:
            try:
                response = await self._send(request)
                self._last_answer_s = time.monotonic()
                return response
            except TooEarly as early:
                if time.monotonic() - self._last_answer_s > self._wait_s:
                    raise GaveUp(f"Gave up: no answer for {self._wait_s:g} s (--wait). Last error: {early}") from early
                delay_s = min(2 * delay_s, MAX_DELAY_S)
                pause_s = delay_s if early.retry_after_s is None else max(early.retry_after_s, MIN_DELAY_S)
                self._limit.throttle(started_s, pause_s)
                self._wait(str(early))
                await anyio.sleep(pause_s)
                started_s = time.monotonic()

    async def _send(self, request: BatchRequest) -> httpx.Response:
        message = self._http.build_request(
            "POST",
            self._endpoint.url(request.path),
            content=json.dumps(request.body).encode(),
            headers={"Content-Type": "application/json", **self._endpoint.headers},
            timeout=httpx.Timeout(self._request_timeout_s, connect=CONNECT_S),
            extensions=dict(self._endpoint.extensions),
        )
        try:
            response = await self._http.send(message, stream=True)
        except httpx.TransportError as error:
            if isinstance(error, httpx.TimeoutException):
                raise TooEarly(f"No answer from {message.url.host} in time.") from error
            raise translate(error, message.url) from error
        if response.status_code != 200:
            try:
                await response.aread()
            except httpx.TransportError as error:
                await response.aclose()
                raise TooEarly(f"{message.url.host} broke off its answer.") from error
            if is_early(response):
                raise TooEarly(refusal(response), retry_after_s(response))
        return response

    async def _read(self, response: httpx.Response) -> Any:
        try:
            body = await response.aread()
        finally:
            await response.aclose()
        try:
            return json.loads(body)
        except ValueError:
            return response.text

    def _wait(self, reason: str) -> None:
        self._progress.notice = reason
        self._progress.changed()

    def _finished(self, num_tokens: int) -> None:
        self._progress.num_finished += 1
        self._progress.num_tokens += num_tokens
        self._progress.notice = ""
        self._progress.changed()


def _num_tokens(content: Any) -> int:
    """Return the completion tokens that an answer reports, in OpenAI's or V1's form; 0 where it reports none."""
    if not isinstance(content, dict):
        return 0
    reports = [content.get("usage"), *(content.get("predictions") or [])]
    counts = (r.get("completion_tokens", r.get("output_tokens", 0)) for r in reports if isinstance(r, dict))
    return sum(count for count in counts if isinstance(count, int))
