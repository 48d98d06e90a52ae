"""Steps launched before the last one's tokens are read, or told: as on an accelerator, with answers as on a CPU."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.sampling import SampledTokens
from model_server.engine.engine import Engine
from model_server.errors import EngineDead, InternalError, OutOfMemory, ServeError
from model_server.request import Event, Finished, FinishReason, Request
from tests.support.engine_requests import GREEDY, Gate, MakeEngine, events, request, until
from tests.support.fakes import TokenIds


def overlapping(engine: Engine) -> Engine:
    engine._shared.runner.is_async = True
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


def of_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what will have happened: steps launched, and their tokens read."""
    happened: list[str] = []
    read = SampledTokens.read

    def noting(picked: SampledTokens) -> Any:
        happened.append("read")
        return read(picked)

    monkeypatch.setattr(SampledTokens, "read", noting)
    Gate(engine, monkeypatch).fault = lambda decode, prefill: happened.append("prompt" if prefill else "decode")
    return happened


UNREAD = ["prompt", "read", "decode", "decode", "read", "decode", "read", "read"]
READ = ["prompt", "read", "decode", "read", "decode", "read", "decode", "read"]


@pytest.mark.parametrize(
    ("aside", "sampling", "order"),
    [
        (True, {}, UNREAD),
        (True, {"generate": {"do_sample": True, "top_p": 0.9, "eos_token_id": None}, "seed": 3}, UNREAD),
        (True, {"generate": GREEDY | {"repetition_penalty": 1.3}}, READ),
        (True, {"generate": {"do_sample": True, "repetition_penalty": 1.3, "eos_token_id": None}}, READ),
        (True, {"logprobs": 0}, READ),
        (False, {}, READ),
    ],
    ids=["greedy", "drawn", "processors", "history", "log-probabilities", "CPU"],
)
async def test_a_step_is_launched_before_the_last_ones_tokens_are_read_where_it_does_not_need_them(
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    aside: bool,
    sampling: dict[str, Any],
    order: list[str],
) -> None:
    engine = overlapping(make_engine()) if aside else make_engine()
    happened = of_steps(engine, monkeypatch)

    await answers(engine, [request(4, sampling=sampling)])

    assert happened == order


async def test_who_comes_is_read_as_soon_as_the_step_under_way_has_ended(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = overlapping(make_engine())
    gate = Gate(engine, monkeypatch)
    steps: list[tuple[int, int]] = []
    late = request(3)

    def note(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        steps.append((len(decode), len(prefill)))
        if len(steps) == 4:
            engine._shared.scheduler.waiting.add(late)

    gate.fault = note
    first, second = await answers(engine, [request(8)]), await events(late)

    assert steps == [(0, 1), (1, 0), (1, 0), (1, 0), (1, 1), (2, 0), (2, 0), (1, 0)]
    assert [chunk.text for chunk in second[0][:-1]] == [chunk.text for chunk in first[0][:3]]


async def test_a_place_left_with_a_step_under_way_serves_the_next_one(make_engine: MakeEngine) -> None:
    """The step that nobody waits for writes to the place that the next request gets."""
    ((*chunks, _),) = await answers(make_engine(), [request(12)])
    ends_early = {"sampling": {"generate": GREEDY | {"eos_token_id": int(chunks[4].text)}}}
    engine = overlapping(make_engine(max_batch_size=1, prefix_caching=False))
    prompts = [range(5, 8), range(40, 48)] * 3
    given = await answers(engine, [request(12, prompt, **ends_early) for prompt in prompts])
    alone = await answers(make_engine(), [request(12, prompt, **ends_early) for prompt in prompts[:2]])

    assert given == alone * 3
    assert given[0][-1].finish_reason is FinishReason.STOP
    await until(lambda: engine.running == 0)
    assert engine.kv_usage == 0


@pytest.mark.parametrize("fault", [ValueError("once"), torch.OutOfMemoryError("CUDA out of memory")])
async def test_a_launch_that_fails_before_the_last_tokens_are_read_is_tried_again_with_them(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    jobs = [request(9), request(6, range(9, 30)), request(9, sampling={"generate": {"do_sample": True}, "seed": 1})]
    wanted = await answers(make_engine(), jobs)
    engine = overlapping(make_engine())
    faults = [fault]

    def break_once(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        if not prefill and decode[0].start == 5 and faults:
            raise faults.pop()

    Gate(engine, monkeypatch).fault = break_once
    again = [request(9), request(6, range(9, 30)), request(9, sampling={"generate": {"do_sample": True}, "seed": 1})]
    assert await answers(engine, again) == wanted
    assert not faults


async def test_rows_beside_one_that_fails_draw_once_for_each_token(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is run again in halves, of which none may be left under way: the other half would take its place."""

    def four() -> list[Request]:
        return [request(9, sampling={"generate": {"do_sample": True}, "seed": seed}) for seed in range(4)]

    wanted = await answers(make_engine(), four())
    engine = overlapping(make_engine())

    def poison_the_last(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        if any(segment.place == 3 * 256 and segment.start == 6 for segment in decode):
            raise ValueError("poison")

    Gate(engine, monkeypatch).fault = poison_the_last
    *others, last = await answers(engine, four())

    assert others == wanted[:3]
    assert isinstance(last, InternalError)


async def test_a_broken_accelerator_ends_the_engine_wherever_it_shows(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = overlapping(make_engine())
    read = SampledTokens.read
    num_read = 0

    def broken(picked: SampledTokens) -> Any:
        nonlocal num_read
        num_read += 1
        if num_read == 3:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return read(picked)

    monkeypatch.setattr(SampledTokens, "read", broken)
    found = await asyncio.wait_for(answers(engine, [request(30), request(30)]), 20)

    assert all(isinstance(answer, EngineDead) for answer in found)
    assert engine.dead is not None


async def test_nothing_stays_under_way_when_all_have_gone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = overlapping(make_engine())
    gate = Gate(engine, monkeypatch)
    gate.fault = lambda decode, prefill: gate.open.clear()  # one step, and the next is waited for
    engine.submit([gone := request(200)])
    for _ in range(3):
        await until(lambda: not gate.open.is_set())
        gate.open.set()
    gone.cancel()
    gate.fault = lambda decode, prefill: None
    gate.open.set()
    await until(lambda: engine.running == 0)
    await until(lambda: engine._shared._under_way is None)

    ((*chunks, _),) = await answers(engine, [request(5)])
    assert len(chunks) == 5


async def test_a_stop_string_frees_the_place_and_the_neighbour_goes_on(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = overlapping(make_engine())
    rows_of_steps: list[int] = []
    Gate(engine, monkeypatch).fault = lambda decode, prefill: rows_of_steps.append(len(decode))

    requests = [with_detokenizer(Stopping(4)), request(30)]

    stopped, neighbour = await answers(engine, requests)

    assert requests[0].num_generated == 4
    assert stopped[-1] == Finished(FinishReason.STOP, prompt_tokens=3, completion_tokens=4)
    assert neighbour[-1] == Finished(FinishReason.LENGTH, prompt_tokens=3, completion_tokens=30)
    assert rows_of_steps == [0, *[2] * 4, *[1] * 25]  # the fourth is one more than it needed
    await until(lambda: engine.running == 0)
    assert engine.kv_usage == 0
    assert engine._shared._under_way is None


@pytest.mark.parametrize("overlaps", [False, True])
async def test_a_row_whose_text_fails_fails_alone(make_engine: MakeEngine, overlaps: bool) -> None:
    engine = make_engine()
    engine._shared.runner.is_async = overlaps

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

    def break_third_step(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
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
    caplog.set_level("INFO", logger="model_server.telemetry.request_log")
    reading = asyncio.create_task(events(*held.requests))
    await held.engine.drain(0)
    held.release.set()
    await reading
    await until(lambda: held.engine.running == 0)

    assert [record.outcome for record in caplog.records] == ["draining"] * 2  # type: ignore[attr-defined]
    assert [one.num_generated for one in held.requests] == [1, 1]
