"""Waiting for an answer to begin, through a cold start and a busy server: one budget for all attempts.

Only what happens before the response is retried. Once it has begun the request is never sent again: the text
would be printed twice, and paid for twice.
"""

from __future__ import annotations

import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

import httpx

from .answer import refusal
from .failures import GaveUp, Unreachable

CONNECT_S = 30.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
SHORTEST_PAUSE_S = 0.1
"""Even for `Retry-After: 0`: a client must not become the load it is waiting out."""

NOT_YET = frozenset({429, 502, 503})
"""Busy, nothing behind the gateway yet, not ready."""


class NotYet(Exception):
    """This attempt came too early; `str` says what was met."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass
class Patience:
    """The time left for an answer to begin, shared by all requests of one command."""

    wait_s: float
    notice: Callable[[str], None] = lambda reason: None
    """Told why there is a wait, before each pause."""
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    deadline_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline_s = self.clock() + self.wait_s

    @property
    def remaining_s(self) -> float:
        return max(self.deadline_s - self.clock(), 0.001)

    def send(self, http: httpx.Client, request: Callable[[float], httpx.Request]) -> httpx.Response:
        """Return the response that has begun, its body unread; `request` makes it from the seconds left.

        Raises:
            GaveUp: `wait_s` passed first.
            Unreachable: no wait can help.
        """
        for pause_s in _pauses():
            try:
                return self._attempt(http, request(self.remaining_s))
            except NotYet as early:
                wanted_s = pause_s if early.retry_after_s is None else early.retry_after_s
                pause_s = max(wanted_s, SHORTEST_PAUSE_S)
                if pause_s >= self.remaining_s:
                    raise GaveUp(f"Gave up after {self.wait_s:g} s (--wait). Last met: {early}") from early
                self.notice(str(early))
                self.sleep(pause_s)
        raise AssertionError("pauses never run out")

    def _attempt(self, http: httpx.Client, request: httpx.Request) -> httpx.Response:
        try:
            response = http.send(request, stream=True)
        except httpx.TimeoutException as error:
            raise NotYet(f"No answer from {request.url.host} in time.") from error
        except httpx.TransportError as error:
            raise _translate(error, request.url) from error
        if response.status_code in NOT_YET or _activator_gave_up(response):
            with closing(response):
                reason = refusal(response)
            raise NotYet(reason, _retry_after_s(response))
        return response


def _pauses() -> Iterator[float]:
    """Yield seconds that double, each shortened at random: those turned away together must not return so."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s * random.uniform(0.5, 1)
        pause_s = min(pause_s * 2, LONGEST_PAUSE_S)


def _translate(error: httpx.TransportError, url: httpx.URL) -> NotYet | Unreachable:
    """Sort a broken attempt: a server that is not there yet, or a mistake that no wait cures."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
            return Unreachable(f"No such host: {url.host}.")
        if isinstance(cause, ssl.SSLError):
            return Unreachable(f"No safe connection to {url.host}: {cause.reason or cause}.")
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.ConnectError):
        return NotYet(f"Nothing answers at {url.host}:{url.port or url.scheme} yet.")
    if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
        return NotYet(f"{url.host} dropped the connection before answering.")
    return Unreachable(f"{url.host} cannot be asked: {error}.")


def _activator_gave_up(response: httpx.Response) -> bool:
    """Tell whether Knative's activator ended the wait for a pod: nothing has seen the request, so ask again.

    A plain `request timeout` is the pod's own proxy: the model was at work, and would be again.
    """
    if response.status_code != 504:
        return False
    try:
        return "activator" in response.read().decode(errors="replace")
    except httpx.TransportError:
        return False


def _retry_after_s(response: httpx.Response) -> float | None:
    """Read `Retry-After`, in seconds or as a date; None when it is absent or nonsense."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0)
    except ValueError:
        return None
