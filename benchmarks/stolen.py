"""Processor time that the host of a virtual machine gives to others: what slows a run without a fault of its own."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from benchmarks.load import Run

MOST_STOLEN = 0.03
TRIES = 3


class Stolen:
    """Counts from the moment it is made."""

    def __init__(self) -> None:
        self._began_s, self._stolen_s = time.perf_counter(), _stolen_s()

    def share(self) -> float:
        """Return how much of all processors' time was taken so far, 0 to 1; 0 where no kernel tells."""
        elapsed_s = time.perf_counter() - self._began_s
        return (_stolen_s() - self._stolen_s) / (elapsed_s * (psutil.cpu_count() or 1))


async def least_disturbed(load: Callable[[], Awaitable[Run]]) -> Run:
    """Return a load's run; one that was robbed of more than `MOST_STOLEN` is done again, a few times at most.

    Whoever is measured is measured so: which run counts is decided by what was taken, not by what came out. A load that
    was cut is not repeated, as its server may still be generating for clients that left.
    """
    runs: list[Run] = []
    while len(runs) < TRIES:
        runs.append(await load())
        if runs[-1].stolen <= MOST_STOLEN or runs[-1].cut:
            break
    return min(runs, key=lambda run: run.stolen)


def _stolen_s() -> float:
    return float(getattr(psutil.cpu_times(), "steal", 0.0))
