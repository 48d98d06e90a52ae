"""Idle tasks: the engine compiles matmuls, then returns unused memory."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from transformers import MistralForCausalLM

from model_server.compute.cpu.packed_linear import PADDED_SIZES, PackedLinear, can_pack
from model_server.compute.kv_cache.dense import DenseKVCache
from model_server.compute.runner import Runner
from model_server.request import Request
from tests.support.engine_requests import MakeEngine, beams, events, request, until
from tests.support.oracle import GREEDY, expected, prompt

packs = pytest.mark.skipif(
    not can_pack(torch.float32, torch.device("cpu")), reason="oneDNN does not pack weights on this machine"
)


class CompilingRunner(Runner):
    """A runner with two matmuls to compile; it records the engine's idle tasks."""

    def __init__(self, model: MistralForCausalLM) -> None:
        self.num_compiled = 0
        self.compiling, self.go_on, self.released = threading.Event(), threading.Event(), threading.Event()
        self.go_on.set()
        kv_cache = DenseKVCache(
            model.config, max_batch_size=6, max_sequence_tokens=256, dtype=model.dtype, device=model.device
        )
        release_unused = kv_cache.release_unused

        def release() -> bool:
            self.released.set()
            return release_unused()

        kv_cache.release_unused = release  # type: ignore[method-assign]
        super().__init__(model, kv_cache)

    def compilations(self) -> list[Any]:
        return [self._compile, self._compile]

    def _compile(self) -> None:
        self.compiling.set()
        self.go_on.wait(60)
        self.num_compiled += 1


@packs
async def test_matmuls_of_all_sizes_are_compiled_for_both_thread_counts(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[int, int]] = []
    compile_matmul = PackedLinear.compile

    def compile(projection: PackedLinear, num_rows: int) -> None:
        compiled.append((torch.get_num_threads(), num_rows))
        compile_matmul(projection, num_rows)

    monkeypatch.setattr(PackedLinear, "compile", compile)
    torch.set_num_threads(2)
    try:
        make_engine(compile_after_s=0.05)
    finally:
        torch.set_num_threads(1)

    num_projections = 5  # queries, keys and values; output; gate and up; down; head
    every_size = [(threads, size) for threads in (1, 2) for size in PADDED_SIZES for _ in range(num_projections)]
    await until(lambda: sorted(compiled) == every_size)


async def test_a_request_waits_for_one_idle_task_at_most(make_engine: MakeEngine, model: MistralForCausalLM) -> None:
    runner = CompilingRunner(model)
    runner.go_on.clear()
    engine = make_engine(model, runner=runner, compile_after_s=0.05)
    await until(runner.compiling.is_set)
    forward, compiled_at_first_step = runner.forward, []

    def noting(*arguments: Any) -> torch.Tensor:
        compiled_at_first_step.append(runner.num_compiled)
        return forward(*arguments)

    runner.forward = noting  # type: ignore[method-assign]
    engine.submit([asked := request(4)])
    runner.go_on.set()
    await events(asked)

    assert compiled_at_first_step[0] == 1


async def test_an_idle_engine_returns_memory_and_empties_the_prefix_cache(
    plain_model: MistralForCausalLM, model: MistralForCausalLM, make_engine: MakeEngine
) -> None:
    runner = CompilingRunner(model)
    engine = make_engine(model, runner=runner, compile_after_s=0.0, release_memory_after_s=0.05)
    requests = [request(4, prompt(100)), request(4, prompt(100))]
    for one in requests:
        runner.released.clear()
        engine.submit([one])
        await events(one)
        await until(runner.released.is_set)

    assert requests[1].num_cached_tokens == 0
    assert requests[1].detokenizers[0].ids == expected(plain_model, prompt(100), 4, GREEDY)  # type: ignore[attr-defined]


async def test_no_idle_task_runs_while_the_fallback_runs(
    make_engine: MakeEngine, model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallback runs in its own thread, and the memory of a `generate` call can be returned only after its end."""
    runner = CompilingRunner(model)
    runner.go_on.clear()
    engine = make_engine(model, runner=runner, compile_after_s=0.05, release_memory_after_s=0.05)
    started, finish = threading.Event(), threading.Event()

    def generate(request: Request, **callbacks: Any) -> None:
        started.set()
        finish.wait(60)

    monkeypatch.setattr(engine.fallback, "generate", generate)
    await until(runner.compiling.is_set)
    engine.submit([beams()])
    await until(started.is_set)
    runner.go_on.set()
    await until(lambda: runner.num_compiled == 1)
    for _ in range(10):
        await asyncio.sleep(0.03)
        assert (runner.num_compiled, runner.released.is_set()) == (1, False)

    finish.set()
    await until(runner.released.is_set)
    assert runner.num_compiled == 2
