"""The scheduling policy: admission order and prefill plans."""

from __future__ import annotations

import functools
import sys
import threading

import pytest

from model_server.caller import Caller
from model_server.engine.scheduling.fair_queue import FairQueue
from model_server.engine.scheduling.scheduler import Scheduler
from model_server.engine.sequence import Sequence
from model_server.request import Request, SamplingParams


def request(num_prompt_tokens: int = 4, group: object = None, key: str | None = None) -> Request:
    return Request([1] * num_prompt_tokens, SamplingParams({}, 8), [], group=group, caller=Caller(key))


def make_scheduler(max_batch_size: int = 4, when_idle: int = 64) -> Scheduler:
    return Scheduler(
        max_batch_size=max_batch_size, max_prefill_tokens_per_step=64, max_prefill_tokens_when_idle=when_idle
    )


def admitted(scheduler: Scheduler, num_prompt_tokens: int, group: object = None) -> Sequence:
    """Return a new sequence of the batch without computed tokens."""
    sequence = Sequence(request(num_prompt_tokens, group), kv_offset=0, started_s=0.0)
    scheduler.sequences.append(sequence)
    return sequence


def decoding(scheduler: Scheduler) -> Sequence:
    """Return a new sequence of the batch with a computed prompt."""
    sequence = admitted(scheduler, 10)
    sequence.advance_prefill(10)
    return sequence


def test_groups_take_turns_and_within_a_group_the_first_comes_first() -> None:
    queue = FairQueue()
    many = [request(group="many") for _ in range(3)]
    single = request()
    for waiting in (*many, single):
        queue.append(waiting)

    assert [queue.pop() for _ in range(5)] == [many[0], single, many[1], many[2], None]


def test_keys_take_turns_before_the_calls_of_one_key_do() -> None:
    queue = FairQueue()
    calls = [request(key="batch") for _ in range(3)]
    instances = [request(key="web", group="one call") for _ in range(2)]
    single = request(key="web")
    for waiting in (*calls, *instances, single):
        queue.append(waiting)

    assert [queue.pop() for _ in range(6)] == [calls[0], instances[0], calls[1], single, calls[2], instances[1]]


def test_a_key_whose_calls_are_not_allowed_does_not_block_another() -> None:
    queue = FairQueue()
    full, free = request(key="batch", group="full"), request(key="web")
    queue.append(full)
    queue.append(free)

    assert queue.pop(lambda group: group != "full") is free
    assert queue.remove_where(lambda r: True) == [full]
    assert (list(queue), len(queue)) == ([], 0)


def test_removing_requests_keeps_the_order_of_the_others() -> None:
    queue = FairQueue()
    first, second, third = (request(group="one") for _ in range(3))
    for waiting in (first, second, third):
        queue.append(waiting)

    assert queue.remove_where(lambda r: r is second) == [second]
    assert list(queue) == [first, third]


def test_the_length_can_be_read_while_another_thread_changes_the_queue(request: pytest.FixtureRequest) -> None:
    """A metrics scrape reads the length while the batch thread admits requests."""
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    queue = FairQueue()
    counted = threading.Event()

    def change() -> None:
        while not counted.is_set():
            for _ in range(20):
                queue.append(Request([1], SamplingParams({}, 8), []))
            queue.remove_where(lambda r: r.number % 2 == 0)
            while queue.pop():
                pass

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert {len(queue) for _ in range(20_000)} <= set(range(21))
    finally:
        counted.set()
        thread.join()
    assert len(queue) == 0


def test_one_group_leaves_an_eighth_of_the_batch_to_the_others() -> None:
    scheduler = make_scheduler(8)
    for _ in range(7):
        admitted(scheduler, 4, group="many")
    scheduler.waiting.append(request(group="many"))
    late = request()
    scheduler.waiting.append(late)

    assert scheduler.next_request() is late
    assert scheduler.next_request() is None


def test_a_single_prompt_gets_the_whole_prefill_budget() -> None:
    scheduler = make_scheduler(4)
    prefilling = admitted(scheduler, 1000)

    assert scheduler.plan_prefill() == [(prefilling, 64)]


def test_a_short_prompt_is_prefilled_beside_a_long_one() -> None:
    scheduler = make_scheduler(4)
    long, short = admitted(scheduler, 1000), admitted(scheduler, 20)

    assert scheduler.plan_prefill() == [(long, 44), (short, 20)]


def test_the_oldest_prompt_keeps_half_the_budget_whatever_else_comes() -> None:
    scheduler = make_scheduler(8)
    oldest = admitted(scheduler, 1000)
    for _ in range(5):
        admitted(scheduler, 30)

    assert dict(scheduler.plan_prefill())[oldest] == 32
    assert sum(count for _, count in scheduler.plan_prefill()) == 64


def test_while_few_sequences_decode_whole_prompts_are_prefilled_together() -> None:
    scheduler = make_scheduler(16, when_idle=256)
    long, *short = (admitted(scheduler, length) for length in (1000, 80, 70, 60, 50))
    for _ in range(5):
        decoding(scheduler)
    assert dict(scheduler.plan_prefill()) == {long: 32, short[3]: 50, short[2]: 60, short[1]: 70}

    decoding(scheduler)
    assert dict(scheduler.plan_prefill()) == {long: 32, short[3]: 32}


def test_a_deferred_sequence_counts_as_not_decoding() -> None:
    scheduler = make_scheduler(16, when_idle=256)
    first, *others = (admitted(scheduler, 200) for _ in range(4))
    for _ in range(4):
        decoding(scheduler)

    assert scheduler.plan_prefill(deferred=set(others)) == [(first, 200)]


def test_the_rest_of_a_prompt_is_prefilled_in_one_step_while_few_sequences_decode() -> None:
    scheduler = make_scheduler(8, when_idle=256)
    prefilling = admitted(scheduler, 257)
    assert scheduler.plan_prefill() == [(prefilling, 64)]
    prefilling.advance_prefill(64)
    assert scheduler.plan_prefill() == [(prefilling, 193)]


def test_sequences_that_decode_prefill_nothing() -> None:
    scheduler = make_scheduler(4)
    decoding(scheduler)

    assert scheduler.plan_prefill() == []
