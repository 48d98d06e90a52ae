"""Long work runs at a low priority, short work does not."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from model_server.thread_priority import LOW, lower, run_lowered

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_short_work_keeps_its_priority() -> None:
    assert run_lowered(priority, after_s=60) == priority()


def test_long_work_is_lowered_and_ends_with_its_result() -> None:
    def work() -> int:
        deadline_s = time.monotonic() + 60
        while priority() != LOW and time.monotonic() < deadline_s:
            time.sleep(0.001)
        return priority()

    before = priority()

    assert run_lowered(work, after_s=0.001) == LOW
    assert priority() == before


def test_an_error_of_the_work_is_raised() -> None:
    def fail() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        run_lowered(fail, after_s=60)


def test_a_pool_of_low_priority_leaves_the_caller_alone() -> None:
    before = priority()
    with ThreadPoolExecutor(1, initializer=lower) as pool:
        assert pool.submit(priority).result() == LOW
    assert priority() == before
