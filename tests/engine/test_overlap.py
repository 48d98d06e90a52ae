"""Overlap scheduling: the order of launches, reads and output, and answers equal to those of the plain loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from model_server.compute.gpu.host_device import AsyncHostCopy
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.sampling import SampledTokens
from model_server.engine.engine import Engine
from model_server.engine.overlap import OverlappedBatchLoop
from model_server.errors import EngineDead, InternalError, OutOfMemory, ServeError
from model_server.request import Event, Finished, FinishReason, PromptLogprobs, Request, TextDelta, Token
from tests.support.engine_requests import GREEDY, Gate, MakeEngine, events, request, until
from tests.support.fakes import OnlyTokens, Stopping, TokenIds


class Failing(TokenIds):
    """Fails at the first token."""

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


def in_flight(engine: Engine) -> object:
    assert isinstance(engine.batch, OverlappedBatchLoop)
    return engine.batch.in_flight


async def answers(engine: Engine, requests: list[Request]) -> list[Any]:
    engine.submit(requests)
    return await events(*requests)


def rounded(answer: list[Event]) -> list[Event]:
    """Return an answer whose log-probabilities have four digits: steps of other sizes round the last ones otherwise."""

    def of_token(token: Token) -> Token:
        top = tuple((id, round(logprob, 4)) for id, logprob in token.top)
        return replace(token, logprob=token.logprob and round(token.logprob, 4), top=top)

    return [
        replace(event, tokens=tuple(map(of_token, event.tokens)))
        if isinstance(event, TextDelta | PromptLogprobs)
        else event
        for event in answer
    ]


async def test_answers_equal_those_of_the_plain_loop(make_engine: MakeEngine) -> None:
    ((*chunks, _),) = await answers(make_engine(), [request(12)])
    eos_token_id = int(chunks[6].text)
    plain = await answers(make_engine(), a_mixed_batch(eos_token_id))
    overlapped = await answers(make_engine(overlap=True), a_mixed_batch(eos_token_id))

    reasons = [answer[-1].finish_reason for answer in plain]
    assert reasons == [FinishReason.LENGTH] * 4 + [FinishReason.STOP] * 2 + [FinishReason.LENGTH] * 3 + ["stop"]
    assert [*map(rounded, overlapped)] == [*map(rounded, plain)]


@pytest.mark.parametrize(
    ("overlap", "order"),
    [
        (True, ["launch", "launch", "text", "launch", "text", "text"]),
        (False, ["launch", "text", "launch", "text", "launch", "text"]),
    ],
    ids=["overlapped", "plain"],
)
async def test_text_is_made_after_the_next_launch_when_overlapped_and_at_once_when_not(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, overlap: bool, order: list[str]
) -> None:
    engine = make_engine(overlap=overlap)
    happened: list[str] = []

    class Noting(TokenIds):
        def push(self, token_id: int) -> str:
            happened.append("text")
            return super().push(token_id)

    Gate(engine, monkeypatch).fault = lambda decode, prefill: happened.append("launch")
    await answers(engine, [with_detokenizer(Noting(), 3)])

    assert happened == order


def launches_and_reads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the engine's launches and reads of tokens are added."""
    happened: list[str] = []
    read = SampledTokens.read

    def noting(tokens: SampledTokens) -> Any:
        happened.append("read")
        return read(tokens)

    monkeypatch.setattr(SampledTokens, "read", noting)
    Gate(engine, monkeypatch).fault = lambda decode, prefill: happened.append("prompt" if prefill else "decode")
    return happened


OVERLAPPED = ["prompt", "decode", "read", "decode", "read", "decode", "read", "read"]
PLAIN = ["prompt", "read", "decode", "read", "decode", "read", "decode", "read"]


@pytest.mark.parametrize(
    ("overlap", "sampling", "order"),
    [
        (True, {}, OVERLAPPED),
        (True, {"generate": {"do_sample": True, "top_p": 0.9, "eos_token_id": None}, "seed": 3}, OVERLAPPED),
        (True, {"generate": GREEDY | {"repetition_penalty": 1.3}}, OVERLAPPED),
        (True, {"generate": {"do_sample": True, "repetition_penalty": 1.3, "eos_token_id": None}}, OVERLAPPED),
        (True, {"logprobs": 2}, OVERLAPPED),
        (True, {"generate": GREEDY | {"suppress_tokens": [5]}}, PLAIN),
        (False, {}, PLAIN),
    ],
    ids=["greedy", "sampled", "penalty", "sampled with penalty", "log-probabilities", "processors", "plain loop"],
)
async def test_a_step_is_launched_before_the_tokens_of_the_last_are_read_if_it_needs_them_only_on_the_device(
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    overlap: bool,
    sampling: dict[str, Any],
    order: list[str],
) -> None:
    engine = make_engine(overlap=overlap)
    happened = launches_and_reads(engine, monkeypatch)

    await answers(engine, [request(4, sampling=sampling)])

    assert happened == order


async def test_steps_that_prefill_a_prompt_overlap_as_those_that_only_decode(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(overlap=True)
    happened = launches_and_reads(engine, monkeypatch)

    await answers(engine, [request(9), request(2, prompt=range(5, 155))])

    launches = [event for event in happened if event != "read"]
    assert launches == ["prompt"] * 4 + ["decode"] * 5
    assert happened == [launches[0], *(event for launch in launches[1:] for event in (launch, "read")), "read"]


async def test_a_prompt_cancelled_with_its_chunk_in_flight_leaves_nothing_behind(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunk still computes, and its region of the KV cache goes to the next sequence."""

    def stream_and_successor() -> list[Request]:
        return [request(30), request(8, prompt=range(40, 75))]

    wanted = await answers(make_engine(), stream_and_successor())
    engine = make_engine(max_batch_size=2, overlap=True)
    cancelled = request(30, prompt=range(5, 205), sampling={"generate": GREEDY, "prompt_logprobs": True})
    stream, successor = stream_and_successor()

    def cancel(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        if prefill and prefill[-1].start > 60:
            cancelled.cancel()

    Gate(engine, monkeypatch).fault = cancel
    answer_of_stream, _, answer_of_successor = await answers(engine, [stream, cancelled, successor])

    assert [answer_of_stream, answer_of_successor] == wanted
    assert cancelled.num_output_tokens == 0
    await until(lambda: engine.running == 0)
    assert engine.kv_usage == 0


async def test_a_grammar_is_sampled_with_its_last_token_on_the_host(make_engine: MakeEngine) -> None:
    def constrained() -> list[Request]:
        return [request(30), request(5, prompt=range(5, 105), matcher=OnlyTokens(range(20, 40)))]

    wanted = await answers(make_engine(), constrained())

    assert await answers(make_engine(overlap=True), constrained()) == wanted


async def test_a_new_request_is_prefilled_as_soon_as_the_step_in_flight_has_ended(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(overlap=True)
    gate = Gate(engine, monkeypatch)
    steps: list[tuple[int, int]] = []
    late = request(3)
    loop = asyncio.get_running_loop()

    async def submit() -> None:
        engine.submit([late])

    def note(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        steps.append((len(decode), len(prefill)))
        if len(steps) == 4:
            asyncio.run_coroutine_threadsafe(submit(), loop).result(10)

    gate.fault = note
    first, second = await answers(engine, [request(8)]), await events(late)

    assert steps == [(0, 1), (1, 0), (1, 0), (1, 0), (1, 1), (2, 0), (2, 0), (1, 0)]
    assert [chunk.text for chunk in second[0][:-1]] == [chunk.text for chunk in first[0][:3]]


async def test_a_kv_region_freed_with_a_step_in_flight_serves_the_next_sequence(make_engine: MakeEngine) -> None:
    """The discarded step writes to the region that the next sequence gets."""
    ((*chunks, _),) = await answers(make_engine(), [request(12)])
    ends_early = {"sampling": {"generate": GREEDY | {"eos_token_id": int(chunks[4].text)}}}
    engine = make_engine(max_batch_size=1, prefix_caching=False, overlap=True)
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
    engine = make_engine(overlap=True)
    faults = [fault]

    def break_once(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        if not prefill and decode[0].start == 5 and faults:
            raise faults.pop()

    Gate(engine, monkeypatch).fault = break_once
    again = [request(9), request(6, range(9, 30)), request(9, sampling={"generate": {"do_sample": True}, "seed": 1})]
    assert await answers(engine, again) == wanted
    assert not faults


async def test_sequences_beside_one_that_fails_sample_once_for_each_token(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is run again in halves, and neither half may be left in flight."""

    def four() -> list[Request]:
        return [request(9, sampling={"generate": {"do_sample": True}, "seed": seed}) for seed in range(4)]

    wanted = await answers(make_engine(), four())
    engine = make_engine(overlap=True)

    def poison_the_last(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        if any((chunk.kv_offset, chunk.start) == (3 * 256, 6) for chunk in decode):
            raise ValueError("poison")

    Gate(engine, monkeypatch).fault = poison_the_last
    *others, last = await answers(engine, four())

    assert others == wanted[:3]
    assert isinstance(last, InternalError)


async def test_a_broken_accelerator_ends_the_engine_wherever_it_shows(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(overlap=True)
    read = SampledTokens.read
    num_read = 0

    def broken(tokens: SampledTokens) -> Any:
        nonlocal num_read
        num_read += 1
        if num_read == 3:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return read(tokens)

    monkeypatch.setattr(SampledTokens, "read", broken)
    found = await asyncio.wait_for(answers(engine, [request(30), request(30)]), 20)

    assert all(isinstance(answer, EngineDead) for answer in found)
    assert engine.dead is not None


async def test_no_step_stays_in_flight_when_the_batch_is_empty(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(overlap=True)
    gate = Gate(engine, monkeypatch)
    gate.fault = lambda decode, prefill: gate.open.clear()  # every step closes the gate
    engine.submit([cancelled := request(200)])
    for _ in range(3):
        await until(lambda: not gate.open.is_set())
        gate.open.set()
    cancelled.cancel()
    gate.fault = lambda decode, prefill: None
    gate.open.set()
    await until(lambda: engine.running == 0)
    await until(lambda: in_flight(engine) is None)

    ((*chunks, _),) = await answers(engine, [request(5)])
    assert len(chunks) == 5


async def test_a_stop_string_ends_one_sequence_and_the_other_goes_on(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(overlap=True)
    batch_sizes: list[int] = []
    Gate(engine, monkeypatch).fault = lambda decode, prefill: batch_sizes.append(len(decode))

    requests = [with_detokenizer(Stopping(4)), request(30)]

    stopped, neighbour = await answers(engine, requests)

    assert requests[0].num_output_tokens == 4
    assert stopped[-1] == Finished(FinishReason.STOP, prompt_tokens=3, completion_tokens=4)
    assert neighbour[-1] == Finished(FinishReason.LENGTH, prompt_tokens=3, completion_tokens=30)
    assert batch_sizes == [0, *[2] * 4, *[1] * 25]  # the fourth step's token for it is discarded
    await until(lambda: engine.running == 0)
    assert engine.kv_usage == 0
    assert in_flight(engine) is None


@pytest.mark.parametrize("overlap", [False, True])
async def test_only_the_sequence_whose_detokenizer_fails_ends(make_engine: MakeEngine, overlap: bool) -> None:
    engine = make_engine(overlap=overlap)

    failed, neighbour = await answers(engine, [with_detokenizer(Failing()), request(10)])

    assert isinstance(failed, InternalError)
    assert neighbour[-1].completion_tokens == 10
    assert engine.dead is None
    await until(lambda: engine.running == 0)


@pytest.mark.parametrize(
    ("fault", "error"),
    [(torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory), (ValueError("poison"), InternalError)],
)
async def test_a_sequence_that_fails_has_sent_the_tokens_before(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, fault: Exception, error: type[ServeError]
) -> None:
    engine = make_engine(overlap=True)

    def break_third_step(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        if decode and decode[0].start == 4:
            raise fault

    Gate(engine, monkeypatch).fault = break_third_step
    engine.submit([one := request(20)])
    received: list[Event] = []

    async def read() -> None:
        async for event in one.answer():
            received.append(event)

    with pytest.raises(error):
        await read()
    assert len(received) == 2


async def test_a_sequence_past_its_max_time_sends_all_tokens_it_has(make_engine: MakeEngine) -> None:
    engine = make_engine(overlap=True)

    (answer,) = await answers(engine, [request(240, sampling={"generate": GREEDY | {"max_time": 0.05}})])

    *chunks, final = answer
    assert final.finish_reason is FinishReason.LENGTH
    assert final.completion_tokens == len(chunks) < 240


@pytest.fixture
async def held(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Held]:
    """An engine held at its third step: its first request has all its tokens, of which one is sent."""
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


async def test_steps_that_only_prefill_are_launched_one_ahead_at_most(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no tokens to read: without a limit, a long prompt's chunks would all be queued on the device."""
    engine = make_engine(overlap=True)
    happened: list[str] = []
    read = AsyncHostCopy.read

    def noting(copy: AsyncHostCopy) -> list[Any]:
        happened.append("wait")
        return read(copy)

    monkeypatch.setattr(AsyncHostCopy, "read", noting)
    Gate(engine, monkeypatch).fault = lambda decode, prefill: happened.append("launch")

    await answers(engine, [request(1, prompt=range(3, 250))])

    assert happened[:4] == ["launch", "launch", "wait", "launch"]
    assert all(happened[i : i + 3] != ["launch"] * 3 for i in range(len(happened)))
