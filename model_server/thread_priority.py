"""Threads of low priority: long work leaves the cores to the steps of the batch.

A forward waits for all of its threads many times in a step. On a machine of few cores another busy thread of the same
priority delays each of these waits by the scheduler's time slice, so that a step of 2 ms takes 80.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

LOW = 10
"""The niceness: a thread of it gets a tenth of a core that another thread wants, so it never starves."""


def lower(thread: threading.Thread | None = None) -> None:
    """Give a thread, by default the calling one, a low priority. Does nothing where threads have none of their own."""
    thread_id = (thread or threading.current_thread()).native_id
    if sys.platform == "linux" and thread_id is not None:
        with contextlib.suppress(OSError):  # the thread has ended, or the sandbox does not allow it
            os.setpriority(os.PRIO_PROCESS, thread_id, LOW)


def run_lowered(work: Callable[[], T], *, after_s: float) -> T:
    """Run `work` in a thread and return its result; if it takes longer than `after_s`, its priority is lowered.

    Raises:
        BaseException: what `work` raises.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return result.result(after_s)
    except TimeoutError:
        lower(thread)
        return result.result()
