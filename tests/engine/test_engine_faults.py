"""Faults and endings of the engine, on a real model; what breaks is a double at the model's edge."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch

from model_server.compute.kv_cache.base import TokenRange
from model_server.errors import (
    Draining,
    EngineDead,
    InternalError,
    OutOfMemory,
)
from tests.support.engine_requests import Gate, MakeEngine, beams, events, request, until


async def test_a_row_that_breaks_its_step_fails_alone(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    gate = Gate(engine, monkeypatch)

    def fault(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        if any(66 in segment.token_ids for segment in prefill):
            raise ValueError("poison")

    gate.fault = fault
    good = [request(prompt=(5, 6, i)) for i in range(4)]
    bad = request(prompt=(5, 66, 7))
    gate.open.clear()
    for one in (*good[:2], bad, *good[2:]):
        engine.submit([one])
    gate.open.set()

    found = await events(*good, bad)

    assert all(isinstance(one, list) for one in found[:4])
    assert isinstance(found[4], InternalError)


async def test_out_of_memory_sheds_the_newest_and_goes_on(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    gate = Gate(engine, monkeypatch)

    def fault(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        if len(decode) + len(prefill) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    gate.fault = fault
    requests = [request() for _ in range(4)]
    engine.submit(requests)

    found = await events(*requests)

    assert [isinstance(one, OutOfMemory) for one in found] == [False, False, True, True]


async def test_when_the_thread_dies_everyone_is_told_within_a_second(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    engine = make_engine(max_batch_size=2, on_death=reasons.append)
    gate = Gate(engine, monkeypatch)

    def fault(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        if decode:
            raise SystemExit("killed")

    gate.fault = fault
    requests = [request(200) for _ in range(4)]
    engine.submit(requests)

    found = await asyncio.wait_for(events(*requests), 5)

    assert all(isinstance(one, EngineDead) for one in found)
    assert engine.dead is not None
    assert reasons == [engine.dead]
    with pytest.raises(EngineDead):
        engine.submit([request()])


async def test_a_step_that_hangs_is_noticed(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(stall_s=0.2)
    gate = Gate(engine, monkeypatch)
    gate.open.clear()
    one = request()
    engine.submit([one])

    (found,) = await asyncio.wait_for(events(one), 5)
    gate.open.set()

    assert isinstance(found, EngineDead)
    assert "0.2 s" in str(engine.dead)


async def test_draining_lets_the_running_and_the_waiting_finish(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_size=1)
    requests = [request(20) for _ in range(3)]
    engine.submit(requests)

    reading = asyncio.create_task(events(*requests))
    await engine.drain(30)

    assert all(isinstance(one, list) for one in await reading)
    with pytest.raises(Draining):
        engine.submit([request()])


async def test_a_request_has_one_line_in_the_log_however_it_ends(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A drain that ran out wrote two: one for its error, one when the row left."""
    caplog.set_level("INFO", logger="model_server.telemetry.request_log")
    engine = make_engine(max_batch_size=1)
    requests = [request(250, request_id="shared"), beams(200)]
    engine.submit(requests)
    await until(lambda: requests[0].num_generated > 0)

    reading = asyncio.create_task(events(*requests))
    await engine.drain(0)
    await reading
    await until(lambda: engine.running == 0)

    assert [record.outcome for record in caplog.records] == ["draining"] * 2  # type: ignore[attr-defined]


async def test_what_is_left_when_draining_is_over_ends_with_an_error(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_size=1)
    requests = [request(250), request(250), beams(200)]
    engine.submit(requests)
    await until(lambda: requests[0].num_generated > 0)

    reading = asyncio.create_task(events(*requests))
    await engine.drain(0)

    assert all(isinstance(one, Draining) for one in await reading)
