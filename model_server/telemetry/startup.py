"""Logs how long each phase of a start took: the cost of every scale-up from zero.

One line a phase, `start: weights 4.10 s (total 6.32 s)`; the total counts from the start of the process.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

PHASES = ("imports", "weights", "warm-up", "listen", "first token")
"""In order: libraries imported, model in memory, one generation done, port open, first token of a client."""


def _process_began_s() -> float:
    """Return when this process started, on the clock of `time.monotonic`."""
    try:
        # proc(5): field 22 of stat, in ticks since boot; psutil rounds it to a second.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux
        age_s = time.time() - psutil.Process().create_time()
    return time.monotonic() - age_s


_remaining = list(PHASES)
_last_s = _began_s = _process_began_s()


def phase_ended(phase: str) -> None:
    """Log that a phase has ended; ignored if the phase is not the next one."""
    global _last_s
    if not _remaining or _remaining[0] != phase:
        return
    _remaining.pop(0)
    now_s = time.monotonic()
    log.info("start: %s %.2f s (total %.2f s)", phase, now_s - _last_s, now_s - _began_s)
    _last_s = now_s
