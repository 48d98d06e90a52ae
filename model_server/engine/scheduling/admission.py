"""Admission: turns a waiting request into a sequence of the batch."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

from model_server.compute.runner import Runner
from model_server.engine.scheduling.scheduler import Scheduler
from model_server.engine.sequence import Sequence
from model_server.request import Request


def admit_next(
    scheduler: Scheduler, runner: Runner, lock: AbstractContextManager[object], now_s: float
) -> Sequence | None:
    """Admit the next request and allocate its KV cache; return None if no request can be admitted.

    The lock is held while the request moves, so that another thread finds it in the queue or in the batch. It is never
    held while waiting for the device, because the event loop takes it too.
    """
    kv_cache = runner.kv_cache

    def fits(request: Request) -> bool:
        return kv_cache.num_allocatable([request.max_tokens]) == 1

    if not scheduler.num_free:
        return None
    with lock:
        request = scheduler.next_request(fits)
        if request is None:
            return None
        request.admitted_s = time.monotonic()
        kv_offset = kv_cache.allocate(request.max_tokens)
        assert kv_offset is not None, "num_allocatable said that it fits, and no other thread allocates"
        sequence = Sequence(request, kv_offset, started_s=now_s)
        scheduler.sequences.append(sequence)
        return sequence
