"""Tokens that are sampled but not yet sent: when their request ends, they are sent once or dropped."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest

from model_server.compute.kv_cache.base import TokenRange
from model_server.engine.engine import Engine
from model_server.errors import EngineDead
from model_server.request import FinishReason, Request
from tests.support.engine_requests import GREEDY, Gate, MakeEngine, answers, events, request, until


@dataclass
class Held:
    engine: Engine
    requests: list[Request]
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    dies: bool = False


@pytest.fixture
async def held(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Held]:
    """An engine that waits in its third step: its first request has all its tokens, and one of them is sent."""
    engine = make_engine(overlap=True)
    held = Held(engine, [request(2), request(4)])

    def fault(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        if len(decode) == 1 and not held.release.is_set():
            held.reached.set()
            held.release.wait(60)
            if held.dies:
                raise SystemExit("killed")

    Gate(engine, monkeypatch).fault = fault
    engine.submit(held.requests)
    await until(held.reached.is_set)
    yield held
    held.release.set()


async def test_a_drain_waits_for_pending_output(held: Held) -> None:
    assert held.engine.running == 2

    reading = asyncio.create_task(events(*held.requests))
    draining = asyncio.create_task(held.engine.drain(30))
    await asyncio.sleep(0.05)
    assert not draining.done()
    held.release.set()
    await draining

    assert all(isinstance(answer, list) for answer in await reading)


async def test_a_request_with_pending_output_ends_with_the_engines_death(held: Held) -> None:
    held.dies = True
    held.release.set()

    found = await asyncio.wait_for(events(*held.requests), 5)

    assert all(isinstance(answer, EngineDead) for answer in found)


async def test_a_request_drained_with_pending_output_has_one_line_in_the_log(
    held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="model_server.telemetry.request_log")
    reading = asyncio.create_task(events(*held.requests))
    await held.engine.drain(0)
    held.release.set()
    await reading
    await until(lambda: held.engine.running == 0)

    assert [record.outcome for record in caplog.records] == ["draining"] * 2  # type: ignore[attr-defined]
    assert [one.num_output_tokens for one in held.requests] == [1, 1]


async def test_a_sequence_past_its_max_time_sends_all_tokens_it_has(make_engine: MakeEngine) -> None:
    engine = make_engine(overlap=True)

    (answer,) = await answers(engine, [request(240, sampling={"generate": GREEDY | {"max_time": 0.05}})])

    *chunks, final = answer
    assert final.finish_reason is FinishReason.LENGTH
    assert final.completion_tokens == len(chunks) < 240
