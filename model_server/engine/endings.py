"""How a request ends in an error, whoever ends it, and how fast requests end."""

from __future__ import annotations

import math
import time
from collections import deque

from model_server.errors import ServeError
from model_server.request import Request
from model_server.telemetry import request_log


def fail(request: Request, error: ServeError) -> None:
    """End a request with an error, unless it has ended; its reader sees it when woken."""
    if not request.channel.ended:
        request.channel.send(error)
        request_log.ended(request, "cancelled" if request.cancelled else error.code)


class CompletionRate:
    """When the last requests ended."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=32)

    def note(self) -> None:
        self._times_s.append(time.monotonic())

    def seconds_until(self, count: float) -> int:
        """Estimate when so many more will have ended, between 1 and 60 s; 5 while nothing is known."""
        if len(self._times_s) < 2:
            return 5
        rate = len(self._times_s) / max(0.1, time.monotonic() - self._times_s[0])
        return max(1, min(60, math.ceil(count / rate)))
