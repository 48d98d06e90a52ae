"""What the engine does when nothing runs: matmuls compiled ahead, then memory handed back."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model_server.compute.fused_linear import PADDED_SIZES, Projection, packable
from model_server.engine import idle
from model_server.engine.engine import Engine
from tests.engine.test_oracle import GREEDY, expected, prompt
from tests.support.engine_requests import beams, events, request, until

MakeEngine = Callable[..., Engine]
packs = pytest.mark.skipif(
    not packable(torch.float32, torch.device("cpu")), reason="oneDNN does not pack weights on this machine"
)


@packs
async def test_matmuls_of_all_sizes_are_compiled_for_both_numbers_of_threads(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "COMPILE_S", 0.05)
    compiled: list[tuple[int, int]] = []
    compile_really = Projection.compile

    def compile(projection: Projection, num_rows: int) -> None:
        compiled.append((torch.get_num_threads(), num_rows))
        compile_really(projection, num_rows)

    monkeypatch.setattr(Projection, "compile", compile)
    torch.set_num_threads(2)
    try:
        engine = make_engine()
    finally:
        torch.set_num_threads(1)
    await until(lambda: not engine._pauses._compilations)

    each_projection = 5  # queries, keys and values; output; gate and up; down; head
    assert sorted(compiled) == [
        (threads, size) for threads in (1, 2) for size in PADDED_SIZES for _ in range(each_projection)
    ]


@packs
async def test_a_request_does_not_wait_until_everything_is_compiled(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "COMPILE_S", 0.05)
    once = threading.Semaphore(0)
    begun = threading.Event()

    def compile(projection: Projection, num_rows: int) -> None:
        begun.set()
        once.acquire(timeout=60)

    monkeypatch.setattr(Projection, "compile", compile)
    engine = make_engine()
    asked = request(4)
    await until(begun.is_set)
    engine.submit([asked])
    once.release()
    await events(asked)

    assert len(asked.detokenizers[0].ids) == 4  # type: ignore[attr-defined]
    assert engine._pauses._compilations
    for _ in range(len(engine._pauses._compilations) + 1):
        once.release()


async def test_after_a_rest_memory_is_handed_back_and_what_was_kept_with_it(
    plain_model: Any, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "REST_S", 0.05)
    monkeypatch.setattr(idle, "COMPILE_S", 0.0)
    engine = make_engine()
    memory: Any = engine._kv_cache
    asked = [request(4, prompt(100)), request(4, prompt(100))]
    for one in asked:
        engine.submit([one])
        await events(one)
        await until(lambda: not memory.memory.any())

    assert asked[1].num_cached == 0
    assert asked[1].detokenizers[0].ids == expected(plain_model, prompt(100), 4, GREEDY)  # type: ignore[attr-defined]


async def test_nothing_is_compiled_or_handed_back_while_the_own_lane_works(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its core, and what a `generate` call frees goes back to the system only after its end."""
    monkeypatch.setattr(idle, "REST_S", 0.05)
    monkeypatch.setattr(idle, "COMPILE_S", 0.05)
    engine = make_engine()
    plan = engine._pauses
    done: list[str] = []
    rested, over = threading.Event(), threading.Event()
    plan._compilations = deque([lambda: done.append("compiled")])
    monkeypatch.setattr(plan, "_rest", rested.set)
    monkeypatch.setattr(engine._own, "answer", lambda request, **callbacks: over.wait(60))

    engine.submit([beams()])
    await until(lambda: engine._own.running is not None)
    await asyncio.sleep(0.3)
    assert (done, rested.is_set()) == ([], False)
    over.set()
    await until(rested.is_set)
    assert done == ["compiled"]
