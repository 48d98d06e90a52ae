"""Mistral 7B's shape with random weights: latency during a long prompt, memory at the limits, kernels of a step.

With stand-ins, the shape is tiny and no measured value is checked.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from model_server.compute.kv_cache.budget import KVCacheBudget
from model_server.compute.runner import Runner
from model_server.engine.config import EngineConfig
from model_server.engine.overlap import OverlappedBatchLoop
from model_server.loading import loader
from model_server.request import Request
from tests.support.engine_requests import GREEDY, SLOW_BEAMS, MakeEngine, events, request

LoadRunner = Callable[[int, int], tuple[Runner, KVCacheBudget]]
Figure = Callable[[str, Any], None]
KERNELS_OF_A_LAYER, OTHER_KERNELS = 13 + 4 * 2, 30
"""For a matmul of few rows, cuBLAS may use two kernels: one computes partial sums and the other adds them."""
MAX_LAG_S = 0.02


def prompt(runner: Runner, num_tokens: int) -> list[int]:
    return random.Random(num_tokens).choices(range(5, runner.model.config.vocab_size), k=num_tokens)


def sizes(runner: Runner) -> dict[str, int]:
    chunk = loader.max_prefill_tokens(runner.model.device)
    return {"max_prefill_tokens_per_step": chunk, "max_prefill_tokens_when_idle": max(512, chunk)}


async def event_loop_lag_s(ended: asyncio.Event) -> float:
    """Return the longest delay of a timer in the event loop."""
    longest_s = 0.0
    while not ended.is_set():
        began_s = time.monotonic()
        await asyncio.sleep(0.002)
        longest_s = max(longest_s, time.monotonic() - began_s - 0.002)
    return longest_s


def first_token_s(one: Request) -> float:
    assert one.first_token_s is not None
    return one.first_token_s - one.arrived_s


async def test_short_prompt_beside_a_long_one_gets_its_first_token_within_three_chunks(
    device: torch.device, load_runner: LoadRunner, make_engine: MakeEngine, figure: Figure
) -> None:
    on_card = device.type == "cuda"
    runner, _ = load_runner(32_500 if on_card else 2000, 8)
    engine = make_engine(runner.model, runner=runner, max_batch_size=8, **sizes(runner))
    await events_of(engine, request(2, prompt(runner, 20)))  # loads kernels
    long = request(2, prompt(runner, 32_000 if on_card else 1500))
    short = request(2, prompt(runner, 100))
    ended = asyncio.Event()
    lag = asyncio.create_task(event_loop_lag_s(ended))

    reading = asyncio.create_task(events_of(engine, long))
    await asyncio.sleep(0.05)
    short.arrived_s = time.monotonic()
    await events_of(engine, short)
    short_before_long = long.first_token_s is None
    await reading
    ended.set()

    chunk_s = first_token_s(long) / -(-long.num_prompt_tokens // sizes(runner)["max_prefill_tokens_per_step"])
    figure("first token beside a long prompt, chunks", round(first_token_s(short) / chunk_s, 2))
    figure("event loop lag, ms", round(1000 * await lag, 2))
    if on_card:
        assert short_before_long
        assert first_token_s(short) < 3 * chunk_s
        assert await lag < MAX_LAG_S


async def events_of(engine: Any, *requests: Request) -> None:
    engine.submit(requests)
    for answer in await events(*requests):
        assert isinstance(answer, list), answer


@pytest.mark.parametrize("memory", ["the card's memory", "an A10G's memory"], indirect=True)
async def test_full_batch_beside_a_prompt_and_the_fallback_at_its_limit_fits_into_memory(
    device: torch.device, memory: str, load_runner: LoadRunner, make_engine: MakeEngine, figure: Figure
) -> None:
    max_model_len = 4096 if device.type == "cuda" else 256
    batch_size = 32 if device.type == "cuda" else 4
    runner, budget = load_runner(max_model_len, batch_size)
    engine = make_engine(
        runner.model,
        runner=runner,
        max_batch_size=budget.max_batch_size,
        max_fallback_tokens=budget.max_fallback_tokens,
        **sizes(runner),
    )
    prompt_tokens = min(max_model_len, budget.num_tokens // batch_size) - 24
    sampling = {"generate": {"do_sample": True, "top_k": 0, "top_p": 0.9, "eos_token_id": None}, "logprobs": 20}
    batch = [request(24, prompt(runner, prompt_tokens - i), sampling=sampling) for i in range(batch_size)]
    beam_tokens = min(max_model_len, budget.max_fallback_tokens // 4)
    beams = request(8, prompt(runner, beam_tokens - 8), sampling={"generate": SLOW_BEAMS})

    failed_before = failed_allocations(device)
    await events_of(engine, *batch, beams)

    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    figure(f"peak of {memory}, GB", round(peak / 1e9, 2))
    figure(f"KV cache in {memory}, tokens", budget.num_tokens)
    assert failed_allocations(device) == failed_before


def failed_allocations(device: torch.device) -> list[int]:
    stats = torch.cuda.memory_stats() if device.type == "cuda" else {}
    return [stats.get(name, 0) for name in ("num_ooms", "num_alloc_retries")]


@pytest.mark.parametrize("batch_size", [1, 32])
def test_decode_step_launches_few_kernels_and_leaves_the_device_busy(
    device: torch.device, load_runner: LoadRunner, figure: Figure, batch_size: int
) -> None:
    batch_size = batch_size if device.type == "cuda" else min(4, batch_size)
    runner, _ = load_runner(1024, batch_size)
    config = EngineConfig(
        max_batch_size=batch_size, max_queue_size=batch_size, max_fallback_tokens=0, prefix_caching=False, stall_s=60.0,
        **sizes(runner),
    )  # fmt: skip
    loop = OverlappedBatchLoop(runner, config, wake=lambda requests: None)
    for i in range(batch_size):
        loop.scheduler.waiting.append(request(20, prompt(runner, 100 + i), sampling={"generate": GREEDY}))
    loop.admit(threading.Lock())
    while not all(s.decoding and s.output_ids for s in loop.scheduler.sequences):
        loop.step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiled:
        for _ in range(4):
            loop.step()
        torch.cuda.synchronize()
    on_device = [e for e in profiled.events() if e.device_type == DeviceType.CUDA]
    times = sorted((e.time_range.start, e.time_range.end) for e in on_device)
    busy_us = sum(end - start for start, end in times)
    total_us = max(end for _, end in times) - times[0][0] if times else 1
    kernels = Counter(e.name for e in on_device if not e.name.startswith(("Memcpy", "Memset")))
    num_kernels = kernels.total() / 4
    weight_bytes = sum(p.nbytes for p in runner.model.parameters()) - runner.model.model.embed_tokens.weight.nbytes
    figure(
        f"decode step, {batch_size} sequences",
        {
            "kernels": num_kernels,
            "by name": {name[:60]: count / 4 for name, count in kernels.most_common(25)},
            "idle": round(1 - busy_us / total_us, 3),
            "weights, GB/s": round(4 * weight_bytes / total_us / 1e3, 1),
        },
    )

    assert num_kernels <= KERNELS_OF_A_LAYER * runner.model.config.num_hidden_layers + OTHER_KERNELS
    assert (num_kernels > 0) == (device.type == "cuda")
