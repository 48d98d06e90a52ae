"""How long each phase of a start took, in the log: what every wake from zero pays.

One line a phase, `start: weights 4.10 s (total 6.32 s)`; the total counts from the start of the process.
"""

from __future__ import annotations

import logging
import time

import psutil

log = logging.getLogger(__name__)

PHASES = ("imports", "weights", "warm-up", "listen", "first token")
"""In order: Python and its libraries, the model in memory, one generation, the port open, a client's first token."""

_to_come = list(PHASES)
_last_s = _began_s = psutil.Process().create_time()


def ended(phase: str) -> None:
    """Log that a phase has ended; one that has been logged, or whose turn has not come, is not."""
    global _last_s
    if not _to_come or _to_come[0] != phase:
        return
    _to_come.pop(0)
    now_s = time.time()
    log.info("start: %s %.2f s (total %.2f s)", phase, now_s - _last_s, now_s - _began_s)
    _last_s = now_s
