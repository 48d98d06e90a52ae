"""The largest step, which runs before the KV cache is allocated, with stand-ins for the allocator's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from model_server.compute.fused_linear import fuse
from model_server.compute.gpu import worst_step
from model_server.compute.gpu.worst_step import reserved_bytes, worst_step_bytes
from model_server.compute.kv_cache import contiguous
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.runner import Runner
from model_server.compute.sampling import SampledTokens
from model_server.compute.sequence_sampler import SequenceSampler
from model_server.compute.token_mask import TokenMask
from tests.support.flash_attention import documented_varlen_attn
from tests.support.tiny_model import tiny_mistral


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The steps that ran: numbers of decoding sequences, prompt tokens and logits."""
    ran: list[tuple[int, int, int]] = []
    forward = Runner.forward

    def recording(
        runner: Runner, decode: Sequence[TokenRange], prefill: Sequence[TokenRange], wanted: Sequence[int]
    ) -> torch.Tensor:
        ran.append((len(decode), sum(len(chunk.token_ids) for chunk in prefill), len(wanted)))
        return forward(runner, decode, prefill, wanted)

    monkeypatch.setattr(Runner, "forward", recording)
    monkeypatch.setattr(contiguous, "varlen_attn", documented_varlen_attn)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + 777 * len(ran))
    return ran


@pytest.mark.parametrize("flash", [True, False])
def test_peak_is_that_of_a_full_batch_beside_a_prompt_with_log_probabilities(
    steps: list[tuple[int, int, int]], flash: bool
) -> None:
    model = tiny_mistral()
    fuse(model)

    assert worst_step_bytes(model, flash=flash, max_batch_size=6, max_prefill_tokens=32) == 777
    assert steps == [(6, 32, 38)]


@pytest.mark.usefixtures("steps")
def test_every_way_to_sample_and_a_mask_for_each_sequence_are_in_the_largest_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_mistral()
    fuse(model)
    kinds: list[tuple[bool, bool, bool]] = []
    masks: list[TokenMask] = []
    sample = worst_step.sample

    def recording(
        logits: torch.Tensor, samplers: Sequence[SequenceSampler], shared: Any, mask: TokenMask
    ) -> SampledTokens:
        kinds.extend((s.do_sample, s.truncates, s.history is not None) for s in samplers)
        masks.append(mask)
        return sample(logits, samplers, shared, mask)

    monkeypatch.setattr(worst_step, "sample", recording)
    worst_step_bytes(model, flash=True, max_batch_size=6, max_prefill_tokens=32)

    assert [list(mask.indices) for mask in masks] == [[*range(6)]]
    assert set(kinds) == {(False, False, False), (True, False, False), (True, True, False), (True, True, True)}


def test_nothing_is_reserved_on_a_cpu(steps: list[tuple[int, int, int]]) -> None:
    assert reserved_bytes(tiny_mistral(), flash=False, max_batch_size=6, max_prefill_tokens=32) == 0
    assert steps == []


@pytest.mark.usefixtures("steps")
def test_graphs_are_reserved_for_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 32 has 7 graphs; their stream has a workspace."""

    class OnCuda:
        device = torch.device("cuda")

    monkeypatch.setattr(worst_step, "worst_step_bytes", lambda model, **sizes: 5)
    sizes: dict[str, Any] = {"max_batch_size": 32, "max_prefill_tokens": 512}

    assert reserved_bytes(OnCuda(), flash=True, **sizes) == 8 * 32 * 2**20 + 5  # type: ignore[arg-type]
    assert reserved_bytes(OnCuda(), flash=False, **sizes) == 5  # type: ignore[arg-type]
