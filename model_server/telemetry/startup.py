"""How long each phase of a start took, in the log: what every wake from zero pays.

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
"""In order: Python and its libraries, the model in memory, one generation, the port open, a client's first token."""


def _process_began_s() -> float:
    """Return when this process began, on `time.monotonic`'s clock."""
    try:
        # proc(5): field 22 of stat, in ticks since boot; psutil knows when that was to the second only.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux
        age_s = time.time() - psutil.Process().create_time()
    return time.monotonic() - age_s


_to_come = list(PHASES)
_last_s = _began_s = _process_began_s()


def ended(phase: str) -> None:
    """Log that a phase has ended; one that has been logged, or whose turn has not come, is not."""
    global _last_s
    if not _to_come or _to_come[0] != phase:
        return
    _to_come.pop(0)
    now_s = time.monotonic()
    log.info("start: %s %.2f s (total %.2f s)", phase, now_s - _last_s, now_s - _began_s)
    _last_s = now_s
