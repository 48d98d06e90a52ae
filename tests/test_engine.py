"""Admission, endings and faults of the engine, on a real model; what breaks is a double at the model's edge."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from model_server.engine import Engine
from model_server.errors import (
    BadRequest,
    Draining,
    EngineDead,
    InternalError,
    OutOfMemory,
    QueueFull,
    ServeError,
    TimedOut,
)
from model_server.memory import Segment
from model_server.request import Chunk, Event, Final, FinishReason, Lane, PromptTokens, Request, Sampling

from .fakes import TokenIds

MakeEngine = Callable[..., Engine]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
SLOW_BEAMS = GREEDY | {"num_beams": 4}


def request(num_tokens: int = 8, prompt: Sequence[int] = (5, 6, 7), **changes: Any) -> Request:
    sampling = {"generate": GREEDY, "max_new_tokens": num_tokens} | changes.pop("sampling", {})
    return Request(
        list(prompt), Sampling(**sampling), [TokenIds() for _ in range(sampling.get("num_answers", 1))], **changes
    )


def beams(num_tokens: int = 200) -> Request:
    return request(num_tokens, sampling={"generate": SLOW_BEAMS, "lane": Lane.OWN})


async def events(*requests: Request) -> list[list[Event] | ServeError]:
    """Read each request to its end: its events, or the error that ended it."""

    async def read(one: Request) -> list[Event] | ServeError:
        try:
            return [event async for event in one.answer()]
        except ServeError as error:
            return error

    return list(await asyncio.gather(*(read(one) for one in requests)))


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for what other threads will do; fail when they do not."""
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        await asyncio.sleep(0.005)


class Gate:
    """Holds every forward until it is opened, and can be told what to raise before one."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.fault: Callable[[Sequence[Segment], Sequence[Segment]], None] = lambda decode, prefill: None
        self.num_steps = 0
        forward = engine._shared.runner.forward

        def gated(decode: Sequence[Segment], prefill: Sequence[Segment], wanted: Sequence[int]) -> torch.Tensor:
            self.open.wait(60)
            self.num_steps += 1
            self.fault(decode, prefill)
            return forward(decode, prefill, wanted)

        monkeypatch.setattr(engine._shared.runner, "forward", gated)


async def test_more_than_may_wait_is_refused_at_once_and_the_others_are_answered(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_batch_size=2, max_queue_size=3)
    gate = Gate(engine, monkeypatch)
    gate.open.clear()
    taken = [request() for _ in range(5)]
    for one in taken:
        engine.submit([one])

    with pytest.raises(QueueFull) as refusal:
        engine.submit([request()])
    with pytest.raises(QueueFull):
        engine.check_open()
    gate.open.set()

    assert refusal.value.retry_after_s is not None
    assert all(isinstance(found, list) for found in await events(*taken))


async def test_an_instances_call_is_taken_whole_or_not_at_all(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_batch_size=2, max_queue_size=3)

    with pytest.raises(QueueFull):
        engine.submit([request() for _ in range(6)])

    assert engine.waiting == 0


async def test_a_request_that_can_never_fit_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=64, own_lane_tokens=100)

    with pytest.raises(BadRequest, match="64"):
        engine.submit([request(62)])
    with pytest.raises(BadRequest, match="Ask for fewer beams"):
        engine.submit([beams(30)])


@pytest.mark.parametrize("make", [request, beams], ids=["shared", "own"])
async def test_a_client_that_leaves_frees_its_place(make_engine: MakeEngine, make: Callable[[int], Request]) -> None:
    engine = make_engine()
    leaving = make(200)
    engine.submit([leaving])
    await until(lambda: engine.running == 1)

    leaving.cancel()

    await until(lambda: engine.running == 0)
    assert leaving.num_generated < 200


@pytest.mark.parametrize("make", [request, beams], ids=["shared", "own"])
async def test_a_client_that_leaves_the_line_frees_its_place_there(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, make: Callable[[int], Request]
) -> None:
    engine = make_engine(max_batch_size=1, max_queue_size=1)
    running, waiting, late = make(200), make(200), make(200)
    engine.submit([running])
    await until(lambda: engine.running == 1)
    engine.submit([waiting])

    waiting.cancel()
    engine.submit([late])

    assert engine.waiting == 1
    running.cancel()
    late.cancel()


async def test_leaving_a_stream_early_cancels_it_within_two_steps(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    gate = Gate(engine, monkeypatch)
    one = request(200)
    engine.submit([one])
    async for _ in one.answer():
        break

    gate.open.clear()
    steps_when_left = gate.num_steps
    gate.open.set()
    await until(lambda: engine.running == 0)

    assert gate.num_steps <= steps_when_left + 2


async def test_a_request_whose_time_is_up_ends_with_what_it_has(make_engine: MakeEngine) -> None:
    engine = make_engine()
    one = request(200)
    engine.submit([one])
    await until(lambda: one.num_generated > 2)
    one.deadline_s = time.monotonic()

    (found,) = await events(one)

    assert isinstance(found, list)
    final = found[-1]
    assert isinstance(final, Final)
    assert (final.finish_reason, 2 < final.completion_tokens < 200) == (FinishReason.LENGTH, True)


async def test_max_time_ends_an_answer_with_length(make_engine: MakeEngine) -> None:
    engine = make_engine()
    one = request(200, sampling={"generate": GREEDY | {"max_time": 1e-6}})
    engine.submit([one])

    (found,) = await events(one)

    assert isinstance(found, list)
    assert found[-1] == Final(FinishReason.LENGTH, 3, one.num_generated)


async def test_a_request_whose_time_is_up_in_the_line_is_told_so(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_batch_size=1)
    gate = Gate(engine, monkeypatch)
    gate.open.clear()
    first, late = request(), request(deadline_s=time.monotonic())
    engine.submit([first])
    await until(lambda: engine.running == 1)
    engine.submit([late])
    gate.open.set()

    found = await events(first, late)

    assert isinstance(found[0], list)
    assert isinstance(found[1], TimedOut)


async def test_a_row_that_breaks_its_step_fails_alone(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    gate = Gate(engine, monkeypatch)

    def fault(decode: Sequence[Segment], prefill: Sequence[Segment]) -> None:
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

    def fault(decode: Sequence[Segment], prefill: Sequence[Segment]) -> None:
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

    def fault(decode: Sequence[Segment], prefill: Sequence[Segment]) -> None:
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
    caplog.set_level("INFO", logger="model_server.journal")
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


async def test_beams_do_not_stop_the_shared_lane(make_engine: MakeEngine) -> None:
    engine = make_engine()
    slow, quick = beams(200), request(4)
    engine.submit([slow])
    await until(lambda: engine.running == 1)
    engine.submit([quick])

    await events(quick)

    assert not slow.channel.ended
    slow.cancel()


async def test_each_lane_computes_with_its_own_number_of_threads(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One core for the own lane, and for the shared lane all, less that one while it works."""
    torch.set_num_threads(3)
    try:
        engine = make_engine()
    finally:
        torch.set_num_threads(1)
    gate = Gate(engine, monkeypatch)
    seen: dict[str, list[int]] = {"shared": [], "own": []}
    over = threading.Event()

    def answer(request: Request, **callbacks: Any) -> None:
        seen["own"].append(torch.get_num_threads())
        over.wait(60)

    gate.fault = lambda decode, prefill: seen["shared"].append(torch.get_num_threads())
    monkeypatch.setattr(engine._own, "answer", answer)
    beside, after = request(1), request(1)

    engine.submit([beams()])
    await until(lambda: seen["own"] == [1])
    engine.submit([beside])
    await events(beside)
    over.set()
    await until(lambda: engine.running == 0)
    engine.submit([after])
    await events(after)

    assert seen == {"shared": [2, 3], "own": [1]}


async def test_several_beam_answers_come_in_one_call(make_engine: MakeEngine) -> None:
    engine = make_engine()
    one = request(6, sampling={"generate": SLOW_BEAMS, "lane": Lane.OWN, "num_answers": 3})
    engine.submit([one])

    (found,) = await events(one)

    assert isinstance(found, list)
    assert sorted(event.index for event in found if isinstance(event, Final)) == [0, 1, 2]


async def test_log_probabilities_equal_the_models(make_engine: MakeEngine, model: Any) -> None:
    prompt = [5, 9, 33, 70]
    one = request(3, prompt, sampling={"logprobs": 2, "prompt_logprobs": True})
    make_engine(prefill_tokens=3).submit([one])

    (found,) = await events(one)

    assert isinstance(found, list)
    tokens = [t for e in found if isinstance(e, PromptTokens | Chunk) for t in e.tokens]
    reference = model(torch.tensor([[t.id for t in tokens]])).logits[0].log_softmax(-1)
    assert [t.id for t in tokens[:4]] == prompt
    assert tokens[0].logprob is None
    for position, token in enumerate(tokens[1:]):
        values, ids = reference[position].topk(2)
        assert token.logprob == pytest.approx(reference[position, token.id].item(), abs=1e-4)
        assert [i for i, _ in token.top] == ids.tolist()
        assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-4)


async def test_penalties_count_the_answers_tokens_only(make_engine: MakeEngine) -> None:
    """OpenAI's penalties: a strong one forbids repetition in the answer, not words of the prompt."""
    plain, penalised = request(30), request(30, sampling={"presence_penalty": 2.0, "frequency_penalty": 2.0})
    engine = make_engine()
    engine.submit([plain])
    engine.submit([penalised])

    await events(plain, penalised)

    ids = [one.detokenizers[0].ids for one in (plain, penalised)]  # type: ignore[attr-defined]
    assert ids[0][0] == ids[1][0]
    assert len(set(ids[1])) >= len(set(ids[0]))
    assert ids[0] != ids[1]
