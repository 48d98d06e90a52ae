"""Processor time that the host of a virtual machine gives to others: what slows a run without a fault of its own."""

from __future__ import annotations

import time

import psutil


class Stolen:
    """Counts from the moment it is made."""

    def __init__(self) -> None:
        self._began_s, self._stolen_s = time.perf_counter(), _stolen_s()

    def share(self) -> float:
        """Return how much of all processors' time was taken so far, 0 to 1; 0 where no kernel tells."""
        elapsed_s = time.perf_counter() - self._began_s
        return (_stolen_s() - self._stolen_s) / (elapsed_s * (psutil.cpu_count() or 1))


def _stolen_s() -> float:
    return float(getattr(psutil.cpu_times(), "steal", 0.0))
