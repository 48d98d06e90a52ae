"""The step loop on a device: it waits only for tokens, and overlap changes no answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.runner import Runner
from model_server.engine.config import EngineConfig
from model_server.engine.overlap import OverlappedBatchLoop
from model_server.request import Request, TextDelta
from model_server.telemetry import metrics
from tests.support.engine_requests import GREEDY, MakeEngine, beams, events, request
from tests.support.tiny_model import tiny_mistral

SAMPLED: dict[str, Any] = {"do_sample": True, "eos_token_id": None}
KINDS: list[dict[str, Any]] = [
    {"generate": GREEDY},
    {"generate": GREEDY | {"eos_token_id": 200}},
    {"generate": GREEDY | {"repetition_penalty": 1.3}},
    {"generate": GREEDY | {"prompt_lookup_num_tokens": 6, "repetition_penalty": 0.1}},
    {"generate": GREEDY, "logprobs": 3, "prompt_logprobs": True},
    {"generate": SAMPLED | {"top_k": 0}, "seed": 1},
    {"generate": SAMPLED | {"top_k": 40, "top_p": 0.9}, "seed": 2},
    {"generate": SAMPLED | {"top_k": 0, "top_p": 0.8, "min_p": 0.01}, "seed": 3},
]
NEAR_TIE = 0.1
"""Tokens with closer log-probabilities may swap ranks when a step of another size rounds differently in 16 bits."""


def make_runner(device: torch.device, *, flash: bool) -> Runner:
    model = tiny_mistral(head_dim=128).to(device, torch.float16 if flash else torch.float32)
    fuse(model)
    cache = ContiguousKVCache(
        model.config, num_tokens=4000, max_sequence_tokens=256, dtype=model.dtype, device=device, flash=flash
    )
    runner = Runner(model, cache)
    runner.capture_graphs(8)
    torch.cuda.synchronize()  # engines compute on other streams
    return runner


@contextlib.contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    with warnings.catch_warnings():  # PyTorch warns that the mode is a prototype, and warnings are errors here
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_admission_steps_and_sampling_wait_for_nothing_but_tokens(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """In this mode, PyTorch raises if the host would wait for the device; reads of a finished copy are allowed."""
    caplog.set_level(logging.DEBUG, logger="model_server.engine")
    config = EngineConfig(
        max_batch_size=8, max_queue_size=8, max_fallback_tokens=0, max_prefill_tokens_per_step=32,
        max_prefill_tokens_when_idle=64, prefix_caching=True, stall_s=60.0,
    )  # fmt: skip
    loop = OverlappedBatchLoop(make_runner(device, flash=True), config, wake=lambda requests: None)
    lock = threading.Lock()
    for mode in ("default", "error"):  # the first round loads kernels
        drafted = metrics.drafted_tokens_total._value.get()
        requests = [request(16, [5 + i, 6 + i, 7 + i] * (8 + 6 * i), sampling=kind) for i, kind in enumerate(KINDS)]
        for one in requests:
            loop.scheduler.waiting.append(one)
        with sync_debug_mode(mode):
            loop.admit(lock)
            while loop.scheduler.sequences:
                loop.step()

        assert [one.num_output_tokens for one in requests] == [16] * len(KINDS)
        assert metrics.drafted_tokens_total._value.get() > drafted
    assert [record.getMessage() for record in caplog.records if record.levelno != logging.INFO] == []


async def generated(make_engine: MakeEngine, runner: Runner, kinds: list[dict[str, Any]], count: int) -> list[Any]:
    """Return the events of requests of all kinds that arrive at random times while the fallback runs beam searches."""
    draw = random.Random(0)
    engine = make_engine(runner.model, runner=runner, max_batch_size=8, max_queue_size=count)
    requests: list[Request] = []
    for i in range(count):
        words = range(5, draw.choice((8, 290)))  # with only three words, the prompt repeats itself
        prompt = [*range(5, 5 + 20 * draw.randrange(3)), *draw.choices(words, k=draw.randrange(1, 90))]
        requests.append(request(draw.randrange(1, 24), prompt, sampling=draw.choice(kinds)) if i % 20 else beams(8))
    reading = []
    for one in requests:
        engine.submit([one])
        reading.append(asyncio.create_task(events(one)))
        await asyncio.sleep(draw.random() * 0.004)
    return [answer for (answer,) in await asyncio.gather(*reading)]


def tokens(answer: Any) -> list[str]:
    assert isinstance(answer, list), answer
    return [event.text for event in answer if isinstance(event, TextDelta)]


async def both_ways(make_engine: MakeEngine, runner: Runner, kinds: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Return the answers without overlap and with it."""
    count = 200 if runner.model.device.type == "cuda" else 12
    answers = []
    for runner.is_async in (False, True):
        answers.append(await generated(make_engine, runner, kinds, count))
        torch.cuda.synchronize()
    return list(zip(*answers, strict=True))


async def test_answers_with_overlap_equal_those_without_in_float32(
    device: torch.device, make_engine: MakeEngine
) -> None:
    answers = await both_ways(make_engine, make_runner(device, flash=False), KINDS)

    assert [tokens(overlapped) for _, overlapped in answers] == [tokens(plain) for plain, _ in answers]


async def test_answers_with_overlap_and_graphs_differ_only_at_near_ties_in_float16(
    device: torch.device, make_engine: MakeEngine
) -> None:
    answers = await both_ways(
        make_engine, make_runner(device, flash=True), [{"generate": GREEDY, "logprobs": 5, "max_new_tokens": 20}]
    )

    for plain, overlapped in answers:
        differing = next(
            (i for i, (a, b) in enumerate(zip(tokens(plain), tokens(overlapped), strict=False)) if a != b), None
        )
        if differing is not None and plain[differing].tokens:
            (token,), (other,) = plain[differing].tokens, overlapped[differing].tokens
            assert token.logprob - dict(token.top).get(other.id, float("-inf")) < NEAR_TIE
