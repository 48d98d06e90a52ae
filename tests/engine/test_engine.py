"""Submission, cancellation, deadlines and the two execution paths of the engine, on a real model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model_server.errors import BadRequest, QueueFull, TimedOut
from model_server.request import Finished, FinishReason, PromptLogprobs, Request, TextDelta
from tests.support.engine_requests import GREEDY, SLOW_BEAMS, Gate, MakeEngine, beams, events, request, until


async def test_a_full_queue_refuses_a_request_and_the_queued_ones_are_answered(
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
        engine.ensure_accepting()
    gate.open.set()

    assert refusal.value.retry_after_s is not None
    assert all(isinstance(found, list) for found in await events(*taken))


async def test_the_requests_of_a_call_are_queued_all_or_none(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_size=2, max_queue_size=3)

    with pytest.raises(QueueFull):
        engine.submit([request() for _ in range(6)])

    assert engine.waiting == 0


async def test_a_request_that_never_fits_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=64, max_fallback_tokens=100)

    with pytest.raises(BadRequest, match="64"):
        engine.submit([request(62)])
    with pytest.raises(BadRequest, match="Ask for fewer beams"):
        engine.submit([beams(30)])


@pytest.mark.parametrize("make", [request, beams], ids=["batch", "fallback"])
async def test_a_cancelled_request_stops_running(make_engine: MakeEngine, make: Callable[[int], Request]) -> None:
    engine = make_engine()
    cancelled = make(200)
    engine.submit([cancelled])
    await until(lambda: engine.running == 1)

    cancelled.cancel()

    await until(lambda: engine.running == 0)
    assert cancelled.num_output_tokens < 200


@pytest.mark.parametrize("make", [request, beams], ids=["batch", "fallback"])
async def test_a_cancelled_request_leaves_the_queue(make_engine: MakeEngine, make: Callable[[int], Request]) -> None:
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


async def test_a_reader_that_leaves_cancels_its_request_within_two_steps(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    gate = Gate(engine, monkeypatch)
    one = request(200)
    engine.submit([one])
    async for _ in one.answer():
        break

    gate.open.clear()
    steps_before = gate.num_steps
    gate.open.set()
    await until(lambda: engine.running == 0)

    assert gate.num_steps <= steps_before + 2


async def test_a_request_past_its_deadline_ends_with_the_tokens_it_has(make_engine: MakeEngine) -> None:
    engine = make_engine()
    one = request(200)
    engine.submit([one])
    await until(lambda: one.num_output_tokens > 2)
    one.deadline_s = time.monotonic()

    (found,) = await events(one)

    assert isinstance(found, list)
    final = found[-1]
    assert isinstance(final, Finished)
    assert (final.finish_reason, 2 < final.completion_tokens < 200) == (FinishReason.LENGTH, True)


async def test_max_time_ends_an_answer_with_length(make_engine: MakeEngine) -> None:
    engine = make_engine()
    one = request(200, sampling={"generate": GREEDY | {"max_time": 1e-6}})
    engine.submit([one])

    (found,) = await events(one)

    assert isinstance(found, list)
    assert found[-1] == Finished(FinishReason.LENGTH, 3, one.num_output_tokens)


async def test_a_request_past_its_deadline_in_the_queue_times_out(
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


async def test_the_batch_generates_while_the_fallback_runs(make_engine: MakeEngine) -> None:
    engine = make_engine()
    slow, quick = beams(200), request(4)
    engine.submit([slow])
    await until(lambda: engine.running == 1)
    engine.submit([quick])

    await events(quick)

    assert not slow.channel.finished
    slow.cancel()


async def test_the_fallback_takes_one_thread_from_the_batch_while_it_runs(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(3)
    try:
        engine = make_engine()
    finally:
        torch.set_num_threads(1)
    gate = Gate(engine, monkeypatch)
    seen: dict[str, list[int]] = {"batch": [], "fallback": []}
    over = threading.Event()

    def generate(request: Request, **callbacks: Any) -> None:
        seen["fallback"].append(torch.get_num_threads())
        over.wait(60)

    gate.fault = lambda decode, prefill: seen["batch"].append(torch.get_num_threads())
    monkeypatch.setattr(engine.fallback, "generate", generate)
    beside, after = request(1), request(1)

    engine.submit([beams()])
    await until(lambda: seen["fallback"] == [1])
    engine.submit([beside])
    await events(beside)
    over.set()
    await until(lambda: engine.running == 0)
    engine.submit([after])
    await events(after)

    assert seen == {"batch": [2, 3], "fallback": [1]}


async def test_one_call_returns_several_beams(make_engine: MakeEngine) -> None:
    engine = make_engine()
    one = request(6, sampling={"generate": SLOW_BEAMS, "num_choices": 3})
    engine.submit([one])

    (found,) = await events(one)

    assert isinstance(found, list)
    assert sorted(event.index for event in found if isinstance(event, Finished)) == [0, 1, 2]


async def test_log_probabilities_equal_those_of_the_model(make_engine: MakeEngine, model: Any) -> None:
    prompt = [5, 9, 33, 70]
    one = request(3, prompt, sampling={"logprobs": 2, "prompt_logprobs": True})
    make_engine(max_prefill_tokens_per_step=3).submit([one])

    (found,) = await events(one)

    assert isinstance(found, list)
    tokens = [t for e in found if isinstance(e, PromptLogprobs | TextDelta) for t in e.tokens]
    reference = model(torch.tensor([[t.id for t in tokens]])).logits[0].log_softmax(-1)
    assert [t.id for t in tokens[:4]] == prompt
    assert tokens[0].logprob is None
    for position, token in enumerate(tokens[1:]):
        values, ids = reference[position].topk(2)
        assert token.logprob == pytest.approx(reference[position, token.id].item(), abs=1e-4)
        assert [i for i, _ in token.top] == ids.tolist()
        assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-4)


async def test_penalties_count_the_generated_tokens_only(make_engine: MakeEngine) -> None:
    """OpenAI's penalties do not apply to the prompt."""
    plain, penalised = request(30), request(30, sampling={"presence_penalty": 2.0, "frequency_penalty": 2.0})
    engine = make_engine()
    engine.submit([plain])
    engine.submit([penalised])

    await events(plain, penalised)

    ids = [one.detokenizers[0].ids for one in (plain, penalised)]  # type: ignore[attr-defined]
    assert ids[0][0] == ids[1][0]
    assert len(set(ids[1])) >= len(set(ids[0]))
    assert ids[0] != ids[1]
