"""The watchdog: reports a step that hangs. Python cannot end the thread of that step, so the process must restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Reports a step that takes too long."""

    def __init__(self, stall_s: float, on_stall: Callable[[str], None]) -> None:
        """Make a watchdog that calls `on_stall` once, with a message, when a step takes longer than `stall_s`."""
        self._stall_s = stall_s
        self._on_stall = on_stall
        self._started_s: dict[str, float] = {}
        self._stopped = threading.Event()

    def start(self, name: str) -> None:
        """Record that the batch or the fallback has started a step."""
        self._started_s[name] = time.monotonic()

    def end(self, name: str) -> None:
        """Record that the batch or the fallback runs no step."""
        self._started_s.pop(name, None)

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        """Watch until `stop` is called or a step hangs."""
        while not self._stopped.wait(self._stall_s / 4):
            now_s = time.monotonic()
            for name, started_s in self._started_s.copy().items():
                if now_s - started_s > self._stall_s:
                    self._on_stall(f"a step of the {name} has taken more than {self._stall_s:g} s")
                    return
