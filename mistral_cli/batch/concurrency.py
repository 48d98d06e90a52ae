"""How many requests are in flight: grown while the server's throughput grows, cut when it refuses.

Hill climbing over windows of completed requests. A window in which the throughput rose by `GAIN` lets the limit grow;
one in which it did not takes the last growth back and holds for `HOLD` windows before it tries again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import anyio

START = 8
GROWTH = 1.5
GAIN = 1.03
CUT = 0.7
HOLD = 10
MIN_WINDOW_S = 1.0


class AdaptiveLimit:
    """A limit on the requests in flight. Used from one event loop."""

    def __init__(self, maximum: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = min(START, maximum)
        self.in_flight = 0
        self._maximum = maximum
        self._clock = clock
        self._changed = anyio.Event()
        self._resume_s = 0.0
        self._last_cut_s = -math.inf
        self._best = 0.0
        """Tokens per second of the window before the last growth."""
        self._before = 0
        """The limit before the last growth; 0 while there is none to take back."""
        self._hold = 0
        self._start_window()

    async def acquire(self) -> float:
        """Wait for room and return the time of the start, for `throttle`."""
        while True:
            pause_s = self._resume_s - self._clock()
            if pause_s > 0:
                await anyio.sleep(pause_s)
            elif self.in_flight < self.limit:
                self.in_flight += 1
                return self._clock()
            else:
                changed = self._changed
                await changed.wait()

    def release(self, num_tokens: int | None = None) -> None:
        """Count a request as ended; `num_tokens` is given for a completed one."""
        self.in_flight -= 1
        if num_tokens is not None:
            self._num_completed += 1
            self._num_tokens += max(1, num_tokens)
            self._climb()
        self._notify()

    def throttle(self, started_s: float, retry_after_s: float) -> None:
        """Cut the limit after a refusal and pause; requests that started before the last cut do not cut it again."""
        now_s = self._clock()
        self._resume_s = max(self._resume_s, now_s + retry_after_s)
        if started_s > self._last_cut_s:
            self.limit = max(1, int(self.limit * CUT))
            self._last_cut_s, self._before, self._hold = now_s, 0, HOLD
            self._start_window()

    def _climb(self) -> None:
        elapsed_s = self._clock() - self._window_s
        if self._num_completed < self.limit or elapsed_s < MIN_WINDOW_S:
            return
        rate = self._num_tokens / elapsed_s
        if self._before and rate < self._best * GAIN:
            self.limit, self._before, self._hold = self._before, 0, HOLD
        elif self._hold:
            self._hold -= 1
        elif self.limit < self._maximum:
            self._best, self._before = rate, self.limit
            self.limit = min(self._maximum, math.ceil(self.limit * GROWTH))
        self._start_window()

    def _start_window(self) -> None:
        self._window_s = self._clock()
        self._num_completed = self._num_tokens = 0

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
