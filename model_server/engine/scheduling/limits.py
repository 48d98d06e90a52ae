"""Limits at submission: refuses requests that never fit or would make the queues too long."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence

from model_server.engine.batch import BatchLoop
from model_server.engine.scheduling.queues import RequestQueues
from model_server.engine.unbatched.batchable import unbatchable_parameter
from model_server.engine.unbatched.fallback import GenerateFallback
from model_server.errors import BadRequest, QueueFull
from model_server.request import Request


class CompletionRate:
    """The rate at which requests complete."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=32)

    def note(self) -> None:
        """Record that a request has completed."""
        self._times_s.append(time.monotonic())

    def seconds_until(self, count: float) -> int:
        """Estimate the time of `count` completions, 1 to 60 s; return 5 s before two completions are recorded."""
        if len(self._times_s) < 2:
            return 5
        rate = len(self._times_s) / max(0.1, time.monotonic() - self._times_s[0])
        return max(1, min(60, math.ceil(count / rate)))


class SubmissionLimits:
    """Refuses requests before they are queued."""

    def __init__(
        self,
        max_queue_size: int,
        queues: RequestQueues,
        batch: BatchLoop,
        fallback: GenerateFallback,
        completions: CompletionRate,
    ) -> None:
        self._max_queue_size = max_queue_size
        self._queues = queues
        self._scheduler = batch.scheduler
        self._kv_cache = batch.runner.kv_cache
        self._fallback = fallback
        self._completions = completions

    def check_fits(self, batched: Iterable[Request], unbatched: Iterable[Request]) -> None:
        """Raise BadRequest if a request needs more memory than there is, or is unbatched and has a grammar."""
        limit = self._kv_cache.max_sequence_tokens
        for request in (*batched, *unbatched):
            if request.max_tokens > limit:
                raise BadRequest(
                    f"prompt and max_new_tokens together are {request.max_tokens} tokens; this server holds {limit}.",
                    field="max_new_tokens",
                )
        for request in unbatched:
            if request.matcher is not None:
                name = unbatchable_parameter(request.sampling)
                raise BadRequest(f"{name} does not work with {request.matcher.field}: leave one out.", field=name)
            self._fallback.check_fits(request)

    def check_queue(self, lengths: Sequence[int], num_unbatched: int = 0) -> None:
        """Raise QueueFull if more than `max_queue_size` requests would wait; the caller holds the engine's lock.

        Args:
            lengths: the tokens of each request for the batch.
            num_unbatched: the number of requests for the fallback.
        """
        waiting = [request.max_tokens for request in self._queues.batch]
        num_admitted = min(self._scheduler.num_free, self._kv_cache.num_allocatable([*waiting, *lengths]))
        would_wait = max(0, len(waiting) + len(lengths) - num_admitted)
        would_wait += max(0, len(self._queues.fallback) + num_unbatched - (self._fallback.running is None))
        if would_wait > self._max_queue_size:
            num_waiting = len(self._queues)
            raise QueueFull(
                f"{num_waiting} requests are waiting and at most {self._max_queue_size} may.",
                retry_after_s=self._completions.seconds_until(num_waiting / 2),
            )
