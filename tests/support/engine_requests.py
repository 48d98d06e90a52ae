"""Requests to an engine, their events, and a gate that delays its forward."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.sampling import SampledTokens
from model_server.engine.engine import Engine
from model_server.errors import ServeError
from model_server.request import Event, Request, SamplingParams
from tests.support.fakes import TokenIds

MakeEngine = Callable[..., Engine]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
SLOW_BEAMS = GREEDY | {"num_beams": 4}


def request(num_tokens: int = 8, prompt: Sequence[int] = (5, 6, 7), **changes: Any) -> Request:
    sampling = {"generate": GREEDY, "max_new_tokens": num_tokens} | changes.pop("sampling", {})
    return Request(
        list(prompt), SamplingParams(**sampling), [TokenIds() for _ in range(sampling.get("num_choices", 1))], **changes
    )


def with_detokenizer(detokenizer: TokenIds, num_tokens: int = 30) -> Request:
    one = request(num_tokens)
    one.detokenizers[0] = detokenizer
    return one


def beams(num_tokens: int = 200) -> Request:
    """Return a request that the fallback generates."""
    return request(num_tokens, sampling={"generate": SLOW_BEAMS})


async def events(*requests: Request) -> list[list[Event] | ServeError]:
    """Return the events of each request until its end, or the error that ended it."""

    async def read(one: Request) -> list[Event] | ServeError:
        try:
            return [event async for event in one.answer()]
        except ServeError as error:
            return error

    return list(await asyncio.gather(*(read(one) for one in requests)))


async def answers(engine: Engine, requests: list[Request]) -> list[Any]:
    """Submit requests in one call and return the events of each until its end."""
    engine.submit(requests)
    return await events(*requests)


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition that depends on other threads holds."""
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not become true"
        await asyncio.sleep(0.005)


class Gate:
    """Delays each forward of an engine until the gate is open; calls `fault`, which may raise, before the forward."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.fault: Callable[[Sequence[TokenRange], Sequence[TokenRange]], None] = lambda decode, prefill: None
        self.num_steps = 0
        forward = engine.runner.forward

        def gated(decode: Sequence[TokenRange], prefill: Sequence[TokenRange], *rest: Any) -> torch.Tensor:
            self.open.wait(60)
            self.num_steps += 1
            self.fault(decode, prefill)
            return forward(decode, prefill, *rest)

        monkeypatch.setattr(engine.runner, "forward", gated)


def launches_and_reads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the engine's launches and token reads are appended."""
    happened: list[str] = []
    read = SampledTokens.read

    def noting(tokens: SampledTokens) -> Any:
        happened.append("read")
        return read(tokens)

    monkeypatch.setattr(SampledTokens, "read", noting)
    Gate(engine, monkeypatch).fault = lambda decode, prefill: happened.append("prompt" if prefill else "decode")
    return happened
