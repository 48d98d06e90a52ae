"""The waiting requests of the batch and of the fallback. The engine's lock guards both queues."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from model_server.engine.outputs.output import finish_with_error
from model_server.engine.scheduling.fair_queue import FairQueue
from model_server.errors import TimedOut
from model_server.request import Request


class RequestQueues:
    """The queue of the batch and the queue of the fallback."""

    def __init__(self, batch: FairQueue, fallback: FairQueue) -> None:
        self.batch = batch
        self.fallback = fallback

    def __len__(self) -> int:
        return len(self.batch) + len(self.fallback)

    def append(self, batched: Iterable[Request], unbatched: Iterable[Request]) -> None:
        for request in batched:
            self.batch.append(request)
        for request in unbatched:
            self.fallback.append(request)

    def remove_where(self, condition: Callable[[Request], bool]) -> list[Request]:
        """Remove and return the requests for which the condition holds."""
        return self.batch.remove_where(condition) + self.fallback.remove_where(condition)

    def purge(self, now_s: float) -> list[Request]:
        """Remove, end and return the requests that were cancelled or have passed their deadline."""
        removed = self.remove_where(lambda request: request.cancelled or request.is_late(now_s))
        for request in removed:
            finish_with_error(request, TimedOut("The request waited for its whole time; the server is too busy."))
        return removed
