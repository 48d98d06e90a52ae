"""The step loop's waits for a GPU, and its memory: on a fake GPU, every uncounted wait raises."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.checkpoint import random_mistral
from model_server.compute.fused_linear import fuse
from model_server.compute.gpu.host_device import AsyncHostCopy
from model_server.compute.gpu.worst_step import worst_step_bytes
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.runner import Runner
from model_server.engine.config import EngineConfig
from model_server.engine.grammar_masks import GrammarMasks
from model_server.engine.overlap import OverlappedBatchLoop
from model_server.telemetry import metrics
from tests.gpu.test_steps import KINDS
from tests.support.engine_requests import GREEDY, request
from tests.support.fake_gpu import CUDA, TOKEN, FakeGPU
from tests.support.fakes import OnlyTokens
from tests.support.tiny_model import tiny_mistral

BATCH_SIZE, PREFILL_TOKENS = 8, 512


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches and the waits of the step loop, in order."""
    events: list[str] = []

    def read(copy: AsyncHostCopy) -> list[Any]:
        events.append("wait")
        numbers: list[Any] = np.full(copy._on_host.shape, TOKEN).tolist()
        return numbers

    monkeypatch.setattr(AsyncHostCopy, "read", read)
    return events


@pytest.fixture
def make_loop(
    gpu: FakeGPU, happened: list[str], caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[[Any], OverlappedBatchLoop]]:
    def make(model: Any) -> OverlappedBatchLoop:
        cache = ContiguousKVCache(
            model.config, num_tokens=70_000, max_sequence_tokens=33_000, dtype=model.dtype, device=CUDA, flash=True
        )
        runner = Runner(model, cache)
        forward = runner.forward

        def launching(*arguments: Any) -> torch.Tensor:
            happened.append("launch")
            return forward(*arguments)

        runner.forward = launching  # type: ignore[method-assign]
        config = EngineConfig(
            max_batch_size=BATCH_SIZE,
            max_queue_size=BATCH_SIZE,
            max_fallback_tokens=0,
            max_prefill_tokens_per_step=PREFILL_TOKENS,
            max_prefill_tokens_when_idle=PREFILL_TOKENS,
            prefix_caching=True,
            stall_s=60.0,
        )
        return OverlappedBatchLoop(runner, config, wake=lambda requests: None)

    yield make
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.fixture
def loop(gpu: FakeGPU, make_loop: Callable[[Any], OverlappedBatchLoop]) -> OverlappedBatchLoop:
    with gpu.reading():
        model = tiny_mistral(head_dim=128).to(CUDA, torch.float16)
    fuse(model)
    return make_loop(model)


def run(loop: OverlappedBatchLoop) -> None:
    lock = threading.Lock()
    loop.admit(lock)
    while loop.scheduler.sequences:
        loop.step()
        loop.admit(lock)


def longest_run_of_launches(happened: list[str]) -> int:
    return max(len(run) for run in "".join(event[0] for event in happened).split("w"))


def test_long_prompt_is_never_launched_more_than_two_steps_ahead(
    loop: OverlappedBatchLoop, happened: list[str]
) -> None:
    """Once, all 62 chunks of 32,000 tokens were launched without a wait: seconds of work ahead of other requests."""
    loop.scheduler.waiting.append(request(4, range(32_000), sampling={"generate": GREEDY}))

    run(loop)

    assert happened.count("launch") == 63 + 3
    assert longest_run_of_launches(happened) == 2


def test_batch_of_every_kind_waits_only_for_its_tokens(loop: OverlappedBatchLoop, happened: list[str]) -> None:
    """Admission, mixed steps, penalties and log-probabilities cause no other wait for the device."""
    kinds: list[dict[str, Any]] = [
        *(kind for kind in KINDS if "prompt_lookup_num_tokens" not in kind["generate"]),
        {"frequency_penalty": 0.5},
    ]
    requests = [request(6, range(100 + 200 * i), sampling=sampling) for i, sampling in enumerate(kinds)]
    for one in requests:
        loop.scheduler.waiting.append(one)

    run(loop)

    assert [one.num_output_tokens for one in requests] == [6] * len(kinds)
    assert longest_run_of_launches(happened) == 2


def test_drafts_grammars_and_copied_prefixes_wait_only_for_tokens(loop: OverlappedBatchLoop) -> None:
    drafted = metrics.drafted_tokens_total._value.get()
    requests = [request(6, [5, 6, TOKEN] * 20, sampling=sampling) for sampling in KINDS]
    for one in requests[::2]:
        one.matcher = OnlyTokens(range(300))

    for some in (requests[:1], requests[1:]):  # the others copy what the first has computed
        for one in some:
            loop.scheduler.waiting.append(one)
        run(loop)

    assert [one.num_output_tokens for one in requests] == [6] * len(KINDS)
    assert metrics.drafted_tokens_total._value.get() > drafted
    assert any(one.num_cached_tokens for one in requests)


def test_step_in_flight_holds_no_logits_on_the_device(loop: OverlappedBatchLoop) -> None:
    """The memory of the largest step is measured without the previous step's logits, 32,000 numbers per token."""
    loop.scheduler.waiting.append(request(4, range(100), sampling={"generate": GREEDY, "prompt_logprobs": True}))
    loop.admit(threading.Lock())

    loop.step()

    assert loop.in_flight is not None
    assert loop.in_flight.drafted_logits.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("grammar", [None, "in time", "late"])
def test_no_step_needs_more_memory_than_the_largest_step(
    gpu: FakeGPU, make_loop: Callable[[Any], OverlappedBatchLoop], monkeypatch: pytest.MonkeyPatch, grammar: str | None
) -> None:
    """At Mistral 7B's sizes, with fewer layers: every layer uses the same memory in turn."""
    with gpu.reading():
        model = random_mistral("2b", torch.float16, "cuda").requires_grad_(False)
        fuse(model)
        largest = worst_step_bytes(model, flash=True, max_batch_size=BATCH_SIZE, max_prefill_tokens=PREFILL_TOKENS)
    loop = make_loop(model)
    if grammar == "late":
        monkeypatch.setattr(GrammarMasks, "late", lambda masks, batch: set(batch.decode))
    sampling = {"generate": {"do_sample": True, "top_k": 0, "top_p": 0.9, "eos_token_id": None}, "logprobs": 20}
    for num_tokens in [60] * (BATCH_SIZE - 1) + [1500]:
        one = request(2, [5, 6, 8] * (num_tokens // 3), sampling=sampling | {"prompt_logprobs": num_tokens > 60})
        one.matcher = OnlyTokens(range(300)) if grammar else None
        loop.scheduler.waiting.append(one)
    before_bytes = gpu.allocated_bytes
    gpu.reset_peak()

    loop.admit(threading.Lock())
    for _ in range(6):
        loop.step()

    assert 0.9 * largest < gpu.peak_bytes - before_bytes <= largest
