"""The limit on requests in flight: it grows while that helps, and a refusal cuts it."""

from __future__ import annotations

import pytest

from mistral_cli.batch.concurrency import AdaptiveLimit


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def settle(capacity: int, maximum: int = 256, requests: int = 20_000) -> AdaptiveLimit:
    """Return the limit after many requests to a server whose speed grows with the load up to `capacity`."""
    clock = Clock()
    limit = AdaptiveLimit(maximum, clock)
    for _ in range(requests):
        while limit.in_flight < limit.limit:
            await limit.acquire()
        clock.now_s += 2.0 / min(limit.in_flight, capacity)
        limit.release(num_tokens=10)
    return limit


@pytest.mark.parametrize("capacity", [1, 8, 32, 100])
async def test_the_limit_settles_above_the_servers_capacity_and_near_it(capacity):
    limit = await settle(capacity)

    assert capacity <= limit.limit <= max(12, 2.5 * capacity)


async def test_the_limit_never_passes_its_maximum():
    assert (await settle(100, maximum=10)).limit == 10


async def test_refusals_of_one_burst_cut_the_limit_once():
    clock = Clock()
    limit = AdaptiveLimit(256, clock)
    starts = [await limit.acquire() for _ in range(8)]
    clock.now_s = 1.0

    for started_s in starts:
        limit.throttle(started_s, retry_after_s=3.0)

    assert limit.limit == 5


async def test_the_limit_never_falls_below_one():
    clock = Clock()
    limit = AdaptiveLimit(1, clock)
    for _ in range(5):
        started_s = await limit.acquire()
        clock.now_s += 1.0
        limit.throttle(started_s, retry_after_s=0.0)
        limit.release()

    assert limit.limit == 1
