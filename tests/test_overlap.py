"""Tokens told while the next step computes, as on an accelerator: the same answers and endings as on a CPU."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from model_server.engine import Engine
from model_server.errors import EngineDead, InternalError, OutOfMemory, ServeError
from model_server.memory import Segment
from model_server.request import Event, Final, FinishReason, Request

from .engine_requests import GREEDY, Gate, MakeEngine, events, request, until
from .fakes import TokenIds


def overlapping(engine: Engine) -> Engine:
    engine._shared.runner.computes_aside = True
    return engine


class Stopping(TokenIds):
    """Meets its stop string with a token of its choice."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def push(self, token_id: int) -> str:
        text = super().push(token_id)
        self.stopped = len(self.ids) == self.after
        return text


class Failing(TokenIds):
    def push(self, token_id: int) -> str:
        raise ValueError("no such token")


def with_detokenizer(detokenizer: TokenIds, num_tokens: int = 30) -> Request:
    one = request(num_tokens)
    one.detokenizers[0] = detokenizer
    return one


@dataclass
class Held:
    engine: Engine
    requests: list[Request]
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    dies: bool = False


def a_mixed_batch(eos_token_id: int) -> list[Request]:
    return [
        *(request(num_tokens, prompt=range(5, 25 + num_tokens)) for num_tokens in (1, 2, 9, 30)),
        *(with_detokenizer(Stopping(after)) for after in (1, 5)),
        request(12, sampling={"generate": GREEDY, "logprobs": 2, "prompt_logprobs": True}),
        request(12, sampling={"generate": {"do_sample": True, "temperature": 1.5}, "seed": 3}),
        request(12, sampling={"generate": GREEDY | {"repetition_penalty": 1.3}}),
        request(12, sampling={"generate": GREEDY | {"eos_token_id": eos_token_id}}),
    ]


async def answers(engine: Engine, requests: list[Request]) -> list[Any]:
    engine.submit(requests)
    return await events(*requests)


async def test_answers_are_those_without_overlap(make_engine: MakeEngine) -> None:
    ((*chunks, _),) = await answers(make_engine(), [request(12)])
    eos_token_id = int(chunks[6].text)
    told_at_once = await answers(make_engine(), a_mixed_batch(eos_token_id))
    told_later = await answers(overlapping(make_engine()), a_mixed_batch(eos_token_id))

    reasons = [answer[-1].finish_reason for answer in told_at_once]
    assert reasons == [FinishReason.LENGTH] * 4 + [FinishReason.STOP] * 2 + [FinishReason.LENGTH] * 3 + ["stop"]
    assert told_later == told_at_once


@pytest.mark.parametrize(
    ("aside", "order"),
    [
        (True, ["launched", "launched", "told", "launched", "told", "told"]),
        (False, ["launched", "told", "launched", "told", "launched", "told"]),
    ],
    ids=["accelerator", "CPU"],
)
async def test_a_token_is_told_after_the_next_step_was_launched_on_an_accelerator_and_at_once_on_a_cpu(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, aside: bool, order: list[str]
) -> None:
    engine = overlapping(make_engine()) if aside else make_engine()
    happened: list[str] = []

    class Noting(TokenIds):
        def push(self, token_id: int) -> str:
            happened.append("told")
            return super().push(token_id)

    Gate(engine, monkeypatch).fault = lambda decode, prefill: happened.append("launched")
    await answers(engine, [with_detokenizer(Noting(), 3)])

    assert happened == order


async def test_a_stop_string_frees_the_place_and_the_neighbour_goes_on(make_engine: MakeEngine) -> None:
    engine = overlapping(make_engine())

    requests = [with_detokenizer(Stopping(4)), request(30)]

    stopped, neighbour = await answers(engine, requests)

    assert requests[0].num_generated == 4
    assert stopped[-1] == Final(FinishReason.STOP, prompt_tokens=3, completion_tokens=4)
    assert neighbour[-1] == Final(FinishReason.LENGTH, prompt_tokens=3, completion_tokens=30)
    await until(lambda: engine.running == 0)
    assert engine.kv_usage == 0


@pytest.mark.parametrize("overlaps", [False, True])
async def test_a_row_whose_text_fails_fails_alone(make_engine: MakeEngine, overlaps: bool) -> None:
    engine = make_engine()
    engine._shared.runner.computes_aside = overlaps

    failed, neighbour = await answers(engine, [with_detokenizer(Failing()), request(10)])

    assert isinstance(failed, InternalError)
    assert neighbour[-1].completion_tokens == 10
    assert engine.dead is None
    await until(lambda: engine.running == 0)


@pytest.mark.parametrize(
    ("fault", "error"),
    [(torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory), (ValueError("poison"), InternalError)],
)
async def test_who_fails_is_told_the_tokens_before(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, fault: Exception, error: type[ServeError]
) -> None:
    engine = overlapping(make_engine())

    def break_third_step(decode: Sequence[Segment], prefill: Sequence[Segment]) -> None:
        if decode and decode[0].start == 4:
            raise fault

    Gate(engine, monkeypatch).fault = break_third_step
    engine.submit([one := request(20)])
    told: list[Event] = []

    async def read() -> None:
        async for event in one.answer():
            told.append(event)

    with pytest.raises(error):
        await read()
    assert len(told) == 2


async def test_whose_time_is_up_is_told_all_tokens_it_has(make_engine: MakeEngine) -> None:
    engine = overlapping(make_engine())

    (answer,) = await answers(engine, [request(240, sampling={"generate": GREEDY | {"max_time": 0.05}})])

    *chunks, final = answer
    assert final.finish_reason is FinishReason.LENGTH
    assert final.completion_tokens == len(chunks) < 240


@pytest.fixture
async def held(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Held]:
    """An engine that is kept from its third step: its first request has all its tokens, and was told one."""
    engine = overlapping(make_engine())
    held = Held(engine, [request(2), request(4)])

    def fault(decode: Sequence[Segment], prefill: Sequence[Segment]) -> None:
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


async def test_a_drain_waits_for_what_is_not_told(held: Held) -> None:
    assert held.engine.running == 2

    reading = asyncio.create_task(events(*held.requests))
    draining = asyncio.create_task(held.engine.drain(30))
    await asyncio.sleep(0.05)
    assert not draining.done()
    held.release.set()
    await draining

    assert all(isinstance(answer, list) for answer in await reading)


async def test_who_was_not_told_the_end_is_told_of_the_engines_death(held: Held) -> None:
    held.dies = True
    held.release.set()

    found = await asyncio.wait_for(events(*held.requests), 5)

    assert all(isinstance(answer, EngineDead) for answer in found)


async def test_who_was_ended_before_the_end_was_told_has_one_line_in_the_log(
    held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="model_server.journal")
    reading = asyncio.create_task(events(*held.requests))
    await held.engine.drain(0)
    held.release.set()
    await reading
    await until(lambda: held.engine.running == 0)

    assert [record.outcome for record in caplog.records] == ["draining"] * 2  # type: ignore[attr-defined]
    assert [one.num_generated for one in held.requests] == [1, 1]
