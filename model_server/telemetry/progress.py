"""Logs the progress of a download or a load, in bytes. Lines and not a bar: a container's log is no terminal."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

log = logging.getLogger(__name__)


class Progress:
    """Logs the progress every few seconds while the block runs, and its completion."""

    def __init__(self, doing: str, total_bytes: int, done_bytes: Callable[[], int], interval_s: float = 5.0) -> None:
        self.doing = doing
        self.total_bytes = total_bytes
        self._done_bytes = done_bytes
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._began_s = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self._log(self.total_bytes)

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._log(min(self._done_bytes(), self.total_bytes))

    def _log(self, done_bytes: int) -> None:
        percent = 100 * done_bytes // self.total_bytes if self.total_bytes else 100
        elapsed_s = time.monotonic() - self._began_s
        log.info(
            "%s: %s of %s (%d%%), %.0f s",
            self.doing,
            in_units(done_bytes),
            in_units(self.total_bytes),
            percent,
            elapsed_s,
        )


def in_units(num_bytes: float) -> str:
    """Return a size in readable units: 14.5 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"
