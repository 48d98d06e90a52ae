"""Faults and drains of the engine, on a real model with a failing forward."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch

from model_server.compute.kv_cache.base import TokenRange
from model_server.errors import Draining, EngineDead, InternalError, OutOfMemory
from tests.support.engine_requests import Gate, MakeEngine, beams, events, request, until


async def test_only_the_sequence_that_breaks_a_step_fails(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    gate = Gate(engine, monkeypatch)

    def fault(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        if any(66 in token_range.token_ids for token_range in prefill):
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


async def test_out_of_memory_ends_the_newest_sequences_and_the_others_go_on(
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


async def test_when_a_thread_dies_every_request_ends_with_an_error(
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


async def test_a_step_that_hangs_ends_the_engine(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(stall_s=0.2)
    gate = Gate(engine, monkeypatch)
    gate.open.clear()
    one = request()
    engine.submit([one])

    (found,) = await asyncio.wait_for(events(one), 5)
    gate.open.set()

    assert isinstance(found, EngineDead)
    assert "0.2 s" in str(engine.dead)


async def test_a_drain_lets_running_and_waiting_requests_finish(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_size=1)
    requests = [request(20) for _ in range(3)]
    engine.submit(requests)

    reading = asyncio.create_task(events(*requests))
    await engine.drain(30)

    assert all(isinstance(one, list) for one in await reading)
    with pytest.raises(Draining):
        engine.submit([request()])


async def test_a_drained_request_has_one_line_in_the_log(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A drain that timed out once wrote two entries: one for the error and one for the released sequence."""
    caplog.set_level("INFO", logger="model_server.telemetry.request_log")
    engine = make_engine(max_batch_size=1)
    requests = [request(250, request_id="batched"), beams(200)]
    engine.submit(requests)
    await until(lambda: requests[0].num_output_tokens > 0)

    reading = asyncio.create_task(events(*requests))
    await engine.drain(0)
    await reading
    await until(lambda: engine.running == 0)

    assert [record.outcome for record in caplog.records] == ["draining"] * 2  # type: ignore[attr-defined]


async def test_requests_that_outlast_a_drain_end_with_an_error(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_size=1)
    requests = [request(250), request(250), beams(200)]
    engine.submit(requests)
    await until(lambda: requests[0].num_output_tokens > 0)

    reading = asyncio.create_task(events(*requests))
    await engine.drain(0)

    assert all(isinstance(one, Draining) for one in await reading)
