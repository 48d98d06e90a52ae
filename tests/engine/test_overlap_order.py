"""Overlap scheduling: the order of launches, reads and output."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from model_server.compute.gpu.host_device import AsyncHostCopy
from model_server.compute.kv_cache.base import TokenRange
from tests.support.engine_requests import (
    GREEDY,
    Gate,
    MakeEngine,
    answers,
    events,
    launches_and_reads,
    request,
    with_detokenizer,
)
from tests.support.fakes import TokenIds


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


async def test_steps_that_only_prefill_are_launched_one_ahead_at_most(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks inside a prompt have no tokens to read: without a limit, all chunks would be queued on the device."""
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
