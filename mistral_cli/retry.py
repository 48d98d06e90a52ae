"""Retries until an answer begins, through a cold start and a busy server. All attempts share one time budget.

Only what happens before the response begins is retried. A request whose response has begun is never sent again: the
text would be printed twice, and generated twice.
"""

from __future__ import annotations

import random
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import NoReturn

import httpx
import tenacity

from .answer import refusal
from .exit_codes import GaveUp, Unreachable

CONNECT_S = 30.0
FIRST_DELAY_S, MAX_DELAY_S = 0.5, 8.0
MIN_DELAY_S = 0.1
"""The minimum delay, even for `Retry-After: 0`, so that clients that wait do not become a load themselves."""

RETRY_STATUSES = frozenset({429, 502, 503})
"""Queue full, no server behind the gateway yet, not ready."""


class TooEarly(Exception):
    """An attempt that may succeed later; `str(error)` is the reason."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass
class Retry:
    """The time left for an answer to begin, shared by all requests of one command."""

    wait_s: float
    notice: Callable[[str], None] = lambda reason: None
    """Called with the reason before each delay."""
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    deadline_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline_s = self.clock() + self.wait_s

    @property
    def remaining_s(self) -> float:
        return max(self.deadline_s - self.clock(), 0.001)

    def send(self, http: httpx.Client, request: Callable[[float], httpx.Request]) -> httpx.Response:
        """Return a response that has begun, its body unread; `request` builds the request from the seconds left.

        Raises:
            GaveUp: no answer began within `wait_s`.
            Unreachable: a retry cannot help.
        """
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TooEarly),
            wait=_delay_s,
            stop=lambda state: state.upcoming_sleep >= self.remaining_s,
            before_sleep=lambda state: self.notice(str(_reason(state))),
            retry_error_callback=self._give_up,
            sleep=self.sleep,
        )
        return attempts(lambda: _attempt(http, request(self.remaining_s)))

    def _give_up(self, state: tenacity.RetryCallState) -> NoReturn:
        reason = _reason(state)
        raise GaveUp(f"Gave up after {self.wait_s:g} s (--wait). Last error: {reason}") from reason


def _reason(state: tenacity.RetryCallState) -> TooEarly:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, TooEarly)
    return error


def _delay_s(state: tenacity.RetryCallState) -> float:
    """Return `Retry-After`, else a delay that doubles; jitter keeps clients that were refused together apart."""
    if (retry_after_s := _reason(state).retry_after_s) is not None:
        return max(retry_after_s, MIN_DELAY_S)
    backoff = tenacity.wait_exponential(multiplier=FIRST_DELAY_S, max=MAX_DELAY_S)
    return backoff(state) * random.uniform(0.5, 1)


def _attempt(http: httpx.Client, request: httpx.Request) -> httpx.Response:
    try:
        response = http.send(request, stream=True)
    except httpx.TimeoutException as error:
        raise TooEarly(f"No answer from {request.url.host} in time.") from error
    except httpx.TransportError as error:
        raise translate(error, request.url) from error
    if is_early(response):
        with closing(response):
            reason = refusal(response)
        raise TooEarly(reason, retry_after_s(response))
    return response


def is_early(response: httpx.Response) -> bool:
    """Return whether a retry can succeed."""
    return response.status_code in RETRY_STATUSES or _activator_timed_out(response)


def translate(error: httpx.TransportError, url: httpx.URL) -> TooEarly | Unreachable:
    """Return the error for a failed connection: a retry can help (`TooEarly`) or not (`Unreachable`)."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
            return Unreachable(f"No such host: {url.host}.")
        if isinstance(cause, ssl.SSLError):
            return Unreachable(f"No secure connection to {url.host}: {cause.reason or cause}.")
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.ConnectError):
        return TooEarly(f"Nothing answers at {url.host}:{url.port or url.scheme} yet.")
    if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
        return TooEarly(f"{url.host} dropped the connection before answering.")
    return Unreachable(f"{url.host} cannot be reached: {error}.")


def _activator_timed_out(response: httpx.Response) -> bool:
    """Return whether Knative's activator found no pod in time: no model has seen the request, so it is sent again.

    A plain `request timeout` comes from the pod's own proxy: the model was generating, and would generate again.
    """
    if response.status_code != 504:
        return False
    try:
        return "activator" in response.read().decode(errors="replace")
    except httpx.TransportError:
        return False


def retry_after_s(response: httpx.Response) -> float | None:
    """Read `Retry-After`, in seconds or as a date; None when it is absent or malformed."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0)
    except ValueError:
        return None
