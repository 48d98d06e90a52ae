"""What a CPU does while nothing runs: compiles what steps will need, then hands memory back. Knows no engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

COMPILE_S, REST_S = 2.0, 60.0
"""How long nothing must have run before the one and the other."""


class IdleTasks:
    """Things to do in pauses, one small one at a time, so that work which comes need not wait."""

    def __init__(self, compilations: Iterable[Callable[[], None]], rest: Callable[[], None]) -> None:
        """Make a plan: each of the compilations once, in the first pause or over several, and a rest in each pause."""
        self._compilations = deque(compilations)
        self._rest = rest
        self.worked()

    def worked(self) -> None:
        """Note that something has run until now."""
        self._began_s = time.monotonic()
        self._rested = False

    @property
    def wait_s(self) -> float | None:
        """How long to wait for work before there is something to do; None: until it comes."""
        if self._rested:
            return None
        due_s = COMPILE_S if self._compilations else REST_S
        return max(0.0, self._began_s + due_s - time.monotonic())

    def use(self) -> None:
        """Do the next thing; call when no work has come within `wait_s`."""
        if self._compilations:
            self._compilations.popleft()()
        else:
            self._rest()
            self._rested = True
