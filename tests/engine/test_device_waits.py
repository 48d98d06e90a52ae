"""Counts the step loop's waits for an accelerator: on PyTorch's meta device, every uncounted read raises."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model_server.compute.fused_linear import fuse
from model_server.compute.gpu.host_device import AsyncHostCopy
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.runner import Runner
from model_server.engine.config import EngineConfig
from model_server.engine.overlap import OverlappedBatchLoop
from tests.support.engine_requests import GREEDY, request
from tests.support.tiny_model import tiny_mistral

META = torch.device("meta")
TOKEN = 7
"""The token that every read returns."""


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches and the waits of the step loop, in order."""
    events: list[str] = []

    def read(copy: AsyncHostCopy) -> list[Any]:
        events.append("wait")
        shape = copy._on_host.shape
        return torch.full(shape, TOKEN, dtype=copy._on_host.dtype).tolist()

    monkeypatch.setattr(AsyncHostCopy, "read", read)
    make_generator: Callable[..., torch.Generator] = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: make_generator())  # the meta device has none
    return events


@pytest.fixture
def loop(happened: list[str]) -> OverlappedBatchLoop:
    model = tiny_mistral(head_dim=128).to(META, torch.float16)
    fuse(model)
    cache = ContiguousKVCache(
        model.config, num_tokens=70_000, max_sequence_tokens=33_000, dtype=model.dtype, device=META, flash=True
    )
    runner = Runner(model, cache)
    forward = runner.forward

    def launching(*arguments: Any) -> torch.Tensor:
        happened.append("launch")
        return forward(*arguments)

    runner.forward = launching  # type: ignore[method-assign]
    config = EngineConfig(
        max_batch_size=8,
        max_queue_size=8,
        max_fallback_tokens=0,
        max_prefill_tokens_per_step=512,
        max_prefill_tokens_when_idle=512,
        prefix_caching=True,
        stall_s=60.0,
    )
    return OverlappedBatchLoop(runner, config, wake=lambda requests: None)


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
    """Admission, mixed steps, penalties and log-probabilities cause no other read from the device."""
    kinds: list[dict[str, Any]] = [
        {},
        {"generate": GREEDY | {"repetition_penalty": 1.3}},
        {"logprobs": 3, "prompt_logprobs": True},
        {"frequency_penalty": 0.5},
    ]
    requests = [request(6, range(100 + 300 * i), sampling=sampling) for i, sampling in enumerate(kinds)]
    for one in requests:
        loop.scheduler.waiting.append(one)

    run(loop)

    assert [one.num_output_tokens for one in requests] == [6] * len(kinds)
    assert longest_run_of_launches(happened) == 2


def test_step_in_flight_holds_no_logits_on_the_device(loop: OverlappedBatchLoop) -> None:
    """The memory of the largest step is measured without the previous step's logits, 32,000 numbers per token."""
    loop.scheduler.waiting.append(request(4, range(100), sampling={"generate": GREEDY, "prompt_logprobs": True}))
    loop.admit(threading.Lock())

    loop.step()

    assert loop.in_flight is not None
    assert loop.in_flight.drafted_logits.untyped_storage().nbytes() == 0
