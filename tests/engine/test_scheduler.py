"""Who waits and who runs: the policy as a specification."""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any

import pytest

from model_server.engine.scheduler import FairQueue, Scheduler, Sequence, by_arrival_desc
from model_server.request import Request, SamplingParams


def request(num_prompt_tokens: int = 4, group: object = None) -> Request:
    return Request([1] * num_prompt_tokens, SamplingParams({}, 8), [], group=group)


def row(scheduler: Scheduler, num_prompt_tokens: int, num_read: int = 0, group: object = None) -> Sequence:
    sampler: Any = None
    new = Sequence(request(num_prompt_tokens, group), place=0, sampler=sampler, started_s=0.0, num_read=num_read)
    scheduler.rows.append(new)
    return new


def test_groups_take_turns_and_within_a_group_the_first_comes_first() -> None:
    room = FairQueue()
    many = [request(group="many") for _ in range(3)]
    single = request()
    for waiting in (*many, single):
        room.add(waiting)

    assert [room.pop() for _ in range(5)] == [many[0], single, many[1], many[2], None]


def test_removed_requests_leave_the_others_in_line() -> None:
    room = FairQueue()
    first, second, third = (request(group="one") for _ in range(3))
    for waiting in (first, second, third):
        room.add(waiting)

    assert room.remove_where(lambda r: r is second) == [second]
    assert list(room) == [first, third]


def test_the_line_is_counted_while_another_thread_changes_it(request: pytest.FixtureRequest) -> None:
    """As a scrape of the metrics does while the engine's thread gives places out."""
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    room = FairQueue()
    counted = threading.Event()

    def change() -> None:
        while not counted.is_set():
            for _ in range(20):
                room.add(Request([1], SamplingParams({}, 8), []))
            room.remove_where(lambda r: r.number % 2 == 0)
            while room.pop():
                pass

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert {len(room) for _ in range(20_000)} <= set(range(21))
    finally:
        counted.set()
        thread.join()
    assert len(room) == 0


def test_one_group_leaves_some_slots_to_the_others() -> None:
    scheduler = Scheduler(max_batch_size=8, prefill_tokens=64, whole_prompt_tokens=64)
    for _ in range(7):
        row(scheduler, 4, group="many")
    scheduler.waiting.add(request(group="many"))
    late = request()
    scheduler.waiting.add(late)

    assert scheduler.next_request() is late
    assert scheduler.next_request() is None


def test_a_lone_prompt_gets_the_whole_reading_budget() -> None:
    scheduler = Scheduler(max_batch_size=4, prefill_tokens=64, whole_prompt_tokens=64)
    reading = row(scheduler, 1000)

    assert scheduler.plan_prefill() == [(reading, 64)]


def test_a_short_prompt_is_read_beside_a_long_one() -> None:
    scheduler = Scheduler(max_batch_size=4, prefill_tokens=64, whole_prompt_tokens=64)
    long, short = row(scheduler, 1000), row(scheduler, 20)

    assert scheduler.plan_prefill() == [(long, 44), (short, 20)]


def test_the_oldest_prompt_keeps_half_the_budget_whatever_else_comes() -> None:
    scheduler = Scheduler(max_batch_size=8, prefill_tokens=64, whole_prompt_tokens=64)
    oldest = row(scheduler, 1000)
    for _ in range(5):
        row(scheduler, 30)

    assert dict(scheduler.plan_prefill())[oldest] == 32
    assert sum(count for _, count in scheduler.plan_prefill()) == 64


def test_while_few_streams_run_whole_prompts_are_read_together() -> None:
    scheduler = Scheduler(max_batch_size=16, prefill_tokens=64, whole_prompt_tokens=256)
    long, *short = (row(scheduler, length) for length in (1000, 80, 70, 60, 50))
    for _ in range(5):
        row(scheduler, 10, num_read=10)
    assert dict(scheduler.plan_prefill()) == {long: 32, short[3]: 50, short[2]: 60, short[1]: 70}

    row(scheduler, 10, num_read=10)
    assert dict(scheduler.plan_prefill()) == {long: 32, short[3]: 32}


def test_who_waits_for_a_reader_counts_among_those_without_a_token() -> None:
    scheduler = Scheduler(max_batch_size=16, prefill_tokens=64, whole_prompt_tokens=256)
    first, *others = (row(scheduler, 200) for _ in range(4))
    for _ in range(4):
        row(scheduler, 10, num_read=10)

    assert scheduler.plan_prefill(waiting=set(others)) == [(first, 200)]


def test_the_rest_of_a_prompt_is_read_in_one_while_few_streams_run() -> None:
    scheduler = Scheduler(max_batch_size=8, prefill_tokens=64, whole_prompt_tokens=256)
    reading = row(scheduler, 257)
    assert scheduler.plan_prefill() == [(reading, 64)]
    reading.num_read = 64
    assert scheduler.plan_prefill() == [(reading, 193)]


def test_rows_that_decode_read_no_prompt() -> None:
    scheduler = Scheduler(max_batch_size=4, prefill_tokens=64, whole_prompt_tokens=64)
    row(scheduler, 10, num_read=10)

    assert scheduler.plan_prefill() == []


def test_the_newest_request_is_shed_first() -> None:
    scheduler = Scheduler(max_batch_size=4, prefill_tokens=64, whole_prompt_tokens=64)
    old, new = row(scheduler, 4), row(scheduler, 4)

    assert by_arrival_desc([old, new]) == [new, old]
