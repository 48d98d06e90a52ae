"""A step that fails under overlap scheduling ends only the sequence that breaks it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.sampling import SampledTokens
from model_server.errors import EngineDead, InternalError, OutOfMemory, ServeError
from model_server.request import Event, Request
from tests.support.engine_requests import Gate, MakeEngine, answers, request, until, with_detokenizer
from tests.support.fakes import TokenIds


class Failing(TokenIds):
    """A detokenizer that fails at the first token."""

    def push(self, token_id: int) -> str:
        raise ValueError("no such token")


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
    """The step runs again in halves, and neither half may stay in flight."""

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
