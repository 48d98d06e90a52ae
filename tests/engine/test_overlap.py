"""Overlap scheduling gives the same answers as the plain loop, and a discarded token has no effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from model_server.compute.kv_cache.base import TokenRange
from model_server.engine.engine import Engine
from model_server.engine.overlap import OverlappedBatchLoop
from model_server.request import Event, Finished, FinishReason, PromptLogprobs, Request, TextDelta, Token
from tests.support.engine_requests import GREEDY, Gate, MakeEngine, answers, request, until, with_detokenizer
from tests.support.fakes import OnlyTokens, Stopping


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


def rounded(answer: list[Event]) -> list[Event]:
    """Return an answer with log-probabilities of four digits: steps of other sizes differ in the last digits."""

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


async def test_a_grammar_is_sampled_with_its_last_token_on_the_host(make_engine: MakeEngine) -> None:
    def constrained() -> list[Request]:
        return [request(30), request(5, prompt=range(5, 105), matcher=OnlyTokens(range(20, 40)))]

    wanted = await answers(make_engine(), constrained())

    assert await answers(make_engine(overlap=True), constrained()) == wanted


async def test_a_prompt_cancelled_with_its_chunk_in_flight_leaves_nothing_behind(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunk is still computed, and the next sequence gets its region of the KV cache."""

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


async def test_a_kv_region_freed_with_a_step_in_flight_serves_the_next_sequence(make_engine: MakeEngine) -> None:
    """The step in flight still writes to the region that the next sequence gets."""
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
    assert batch_sizes == [0, *[2] * 4, *[1] * 25]  # its token of the fourth step is discarded
    await until(lambda: engine.running == 0)
    assert engine.kv_usage == 0
    assert in_flight(engine) is None
