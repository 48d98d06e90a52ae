"""A step makes the host wait for the device once, for its tokens: on PyTorch's `meta` device, any read raises.

The kernels' own signatures are checked by the way: `varlen_attn` is the real one.
"""

from __future__ import annotations

import pytest
import torch
from transformers import MistralForCausalLM

from model_server.compute import sampling
from model_server.compute.cuda_graphs import DecodeGraphs
from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.runner import Runner
from model_server.compute.sampling import sample, sequence_sampler
from model_server.request import SamplingParams
from tests.support.engine_requests import GREEDY
from tests.support.tiny_model import tiny_mistral

META = torch.device("meta")


@pytest.fixture
def on_meta() -> MistralForCausalLM:
    model = tiny_mistral(head_dim=128).to(META, torch.float16)
    fuse(model)
    return model


@pytest.fixture
def runner(on_meta: MistralForCausalLM) -> Runner:
    spans = ContiguousKVCache(
        on_meta.config, num_tokens=2000, max_sequence_tokens=256, dtype=on_meta.dtype, device=META, flash=True
    )
    return Runner(on_meta, spans)


def test_reading_raises() -> None:
    with pytest.raises(NotImplementedError):
        torch.zeros(3, device=META).tolist()


def test_only_a_cpu_has_computed_when_a_forward_returns(runner: Runner, model: MistralForCausalLM) -> None:
    assert runner.is_async
    assert not Runner(model, runner.kv_cache).is_async


def test_forward_reads_nothing_back(runner: Runner) -> None:
    first, second = (runner.kv_cache.allocate(256) or 0 for _ in range(2))
    prompts = [TokenRange(first, 0, list(range(5, 75))), TokenRange(second, 0, [3, 4, 5])]

    assert runner.forward([], prompts, [69, 72]).shape == (2, 300)
    runner.kv_cache.copy(first, second, 3)
    assert runner.forward([TokenRange(first, 70, [3])], [TokenRange(second, 3, [6, 7])], [0, 2]).shape == (2, 300)
    assert runner.forward([TokenRange(first, 71, [3]), TokenRange(second, 5, [4])], [], [0, 1]).shape == (2, 300)


def test_static_step_reads_nothing_back(runner: Runner) -> None:
    assert isinstance(runner.kv_cache, ContiguousKVCache)
    graphs = DecodeGraphs(runner._decoder, runner.kv_cache, 8)

    decode = [TokenRange(0, 70, [3]), TokenRange(256, 6, [4]), TokenRange(512, 9, [4])]
    assert graphs.run(decode).shape == (3, 300)
    assert graphs.run(decode, torch.zeros(3, dtype=torch.long, device=META)).shape == (3, 300)


def test_step_after_one_that_nobody_has_read_reads_nothing_back(runner: Runner, model: MistralForCausalLM) -> None:
    kinds = [GREEDY, {"do_sample": True}, {"do_sample": True, "top_k": 0}, GREEDY]
    rows = [sequence_sampler(model, [5, 6, 7], SamplingParams(generate=kind, max_new_tokens=4)) for kind in kinds]
    decode = [TokenRange(256 * i, 70, [3]) for i in range(4)]

    picked = sample(runner.forward(decode, [], range(4)), rows, None)  # type: ignore[arg-type]
    assert picked.on_device is not None
    assert picked.on_device.shape == (4,)
    assert runner.forward(decode, [], range(4), picked.on_device).shape == (4, 300)
    with pytest.raises(NotImplementedError):
        picked.read()


@pytest.mark.parametrize(
    "generate",
    [
        {},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
        {"top_k": 0, "top_p": 0.5},
        {"repetition_penalty": 1.3},
    ],
    ids=["model's own", "few candidates", "whole vocabulary", "history"],
)
def test_drawing_reads_nothing_back(
    model: MistralForCausalLM, generate: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = SamplingParams(generate={"do_sample": True, **generate}, max_new_tokens=4)
    rows = [sequence_sampler(model, [5, 6, 7], wanted) for _ in range(3)]
    for row in rows:
        if row.history is not None:
            row.history = row.history.to(META)

    drawn = sampling._sample_together(torch.zeros((3, 300), device=META), rows, 200, None)  # type: ignore[arg-type]

    assert drawn.shape == (3,)
