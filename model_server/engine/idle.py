"""Idle tasks, which the batch thread runs while no request runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

ONCE_AFTER_S, RELEASE_AFTER_S = 2.0, 60.0
"""How long the engine must be idle before a task that runs once, and before it releases memory."""

Task = Callable[[], None]


class IdleTasks:
    """Runs each task once, then releases memory once in each idle period.

    `run_next` runs one short task, so a new request waits for at most one task.
    """

    def __init__(
        self,
        once: Iterable[Task],
        release_memory: Task,
        *,
        once_after_s: float = ONCE_AFTER_S,
        release_after_s: float = RELEASE_AFTER_S,
    ) -> None:
        self._once = deque(once)
        self._release_memory = release_memory
        self._once_after_s = once_after_s
        self._release_after_s = release_after_s
        self.touch()

    def touch(self) -> None:
        """Record that a request ran until now: start a new idle period."""
        self._idle_since_s = time.monotonic()
        self._released = False

    @property
    def wait_s(self) -> float | None:
        """How long to wait for requests before the next task is due; None if there is none."""
        if self._released:
            return None
        after_s = self._once_after_s if self._once else self._release_after_s
        return max(0.0, self._idle_since_s + after_s - time.monotonic())

    def run_next(self) -> None:
        """Run the next task; call it if no request has arrived within `wait_s`."""
        if self._once:
            self._once.popleft()()
        else:
            self._release_memory()
            self._released = True
