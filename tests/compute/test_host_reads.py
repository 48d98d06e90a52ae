"""Building a sampler, running a step and sampling never wait for the device: on PyTorch's meta device, any read raises.

The tests also check the kernels' signatures, because they call the real flash attention operator.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralForCausalLM

from model_server.compute.fused_linear import fuse
from model_server.compute.gpu.cuda_graphs import DecodeGraphs
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.logprobs import TokenLogprobs
from model_server.compute.runner import Runner
from model_server.compute.sampling import sample
from model_server.compute.sequence_sampler import sequence_sampler
from model_server.request import SamplingParams
from tests.support.engine_requests import GREEDY
from tests.support.tiny_model import tiny_mistral

META = torch.device("meta")
NO_GENERATOR: Any = None
"""The meta device has no random generators, and its random operations take none."""
SAMPLED: dict[str, Any] = {"do_sample": True}
BATCHED: list[dict[str, Any]] = [
    GREEDY,
    GREEDY | {"repetition_penalty": 1.3},
    SAMPLED | {"top_k": 0},
    SAMPLED | {"top_k": 0, "temperature": 0.7},
    SAMPLED | {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
    SAMPLED | {"top_k": 0, "top_p": 0.5},
    SAMPLED | {"top_k": 290},
    SAMPLED | {"repetition_penalty": 1.3},
]


@pytest.fixture(scope="module")
def on_meta() -> MistralForCausalLM:
    model = tiny_mistral(head_dim=128).to(META, torch.float16)
    fuse(model)
    return model


@pytest.fixture
def runner(on_meta: MistralForCausalLM) -> Runner:
    cache = ContiguousKVCache(
        on_meta.config, num_tokens=2000, max_sequence_tokens=256, dtype=on_meta.dtype, device=META, flash=True
    )
    return Runner(on_meta, cache)


def params(generate: dict[str, Any], **changes: Any) -> SamplingParams:
    return SamplingParams(generate=generate, max_new_tokens=4, **changes)


def test_reading_raises() -> None:
    with pytest.raises(NotImplementedError):
        torch.zeros(3, device=META).tolist()


def test_only_a_cpu_has_computed_when_a_forward_returns(runner: Runner, model: MistralForCausalLM) -> None:
    assert runner.is_async
    assert not Runner(model, runner.kv_cache).is_async


def test_forward_reads_nothing(runner: Runner) -> None:
    first, second = (runner.kv_cache.allocate(256) or 0 for _ in range(2))
    prompts = [TokenRange(first, 0, list(range(5, 75))), TokenRange(second, 0, [3, 4, 5])]

    assert runner.forward([], prompts, [69, 72]).shape == (2, 300)
    runner.kv_cache.copy(first, second, 3)
    assert runner.forward([TokenRange(first, 70, [3])], [TokenRange(second, 3, [6, 7])], [0, 2]).shape == (2, 300)
    assert runner.forward([TokenRange(first, 71, [3]), TokenRange(second, 5, [4])], [], [0, 1]).shape == (2, 300)


def test_static_step_reads_nothing(runner: Runner) -> None:
    assert isinstance(runner.kv_cache, ContiguousKVCache)
    graphs = DecodeGraphs(runner.decoder, runner.kv_cache, 8)

    decode = [TokenRange(0, 70, [3]), TokenRange(256, 6, [4]), TokenRange(512, 9, [4])]
    assert graphs.run(decode).shape == (3, 300)
    assert graphs.run(decode, torch.zeros(3, dtype=torch.long, device=META)).shape == (3, 300)


@pytest.mark.parametrize(
    "generate",
    [
        *BATCHED,
        GREEDY | {"min_new_tokens": 2, "eos_token_id": [2, 3]},
        GREEDY | {"suppress_tokens": [5, 6]},
        GREEDY | {"encoder_repetition_penalty": 1.4},
        GREEDY | {"encoder_no_repeat_ngram_size": 2},
        GREEDY | {"sequence_bias": [[[10], 5.0]]},
    ],
    ids=str,
)
def test_building_a_sampler_reads_nothing(on_meta: MistralForCausalLM, generate: dict[str, Any]) -> None:
    """Building once waited seven times for the step in flight, while the event loop waited for the engine's lock."""
    sampler = sequence_sampler(on_meta, [5, 6, 7], params(generate))

    tensors = [value for p in sampler.processors for value in vars(p).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.device == META for tensor in tensors)


def test_step_after_one_that_the_host_has_not_read_reads_nothing(runner: Runner, on_meta: MistralForCausalLM) -> None:
    samplers = [sequence_sampler(on_meta, [5, 6, 7], params(generate)) for generate in BATCHED]
    decode = [TokenRange(i, 70, [3]) for i in range(len(samplers))]

    sampled = sample(runner.forward(decode, [], range(len(decode))), samplers, NO_GENERATOR)
    assert sampled.on_device is not None
    assert sampled.on_device.shape == (len(samplers),)
    assert runner.forward(decode, [], range(len(decode)), sampled.on_device).shape == (len(samplers), 300)
    with pytest.raises(NotImplementedError):
        sampled.read()


def test_log_probabilities_are_computed_without_a_read() -> None:
    logprobs = TokenLogprobs(
        torch.zeros((3, 300), device=META), torch.zeros(3, dtype=torch.long, device=META), [0, 5, 2]
    )

    with pytest.raises(NotImplementedError):
        logprobs.read()


class Kernels(TorchDispatchMode):
    """Counts the operations that launch a kernel: all except views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and func.overloadpacket.__name__ not in ("empty", "empty_like", "new_empty", "detach"):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations_of_a_decode_step(num_layers: int) -> Counter[str]:
    model = tiny_mistral(head_dim=128, num_hidden_layers=num_layers).to(META, torch.float16)
    fuse(model)
    cache = ContiguousKVCache(
        model.config, num_tokens=2000, max_sequence_tokens=256, dtype=model.dtype, device=META, flash=True
    )
    graphs = DecodeGraphs(Runner(model, cache).decoder, cache, 2)
    with Kernels() as kernels:
        graphs.run([TokenRange(0, 70, [3]), TokenRange(256, 6, [4])])
    return Counter(kernels.names)


def test_layer_of_a_decode_step_is_13_operations() -> None:
    """On a GPU, each operation is a kernel of 2 to 5 us; attention is several kernels."""
    per_layer = operations_of_a_decode_step(3) - operations_of_a_decode_step(2)

    assert per_layer.total() == 13
    assert per_layer == {
        "rms_norm": 2,
        "linear": 2,
        "addmm_": 2,
        "flip": 1,
        "mul_": 2,
        "addcmul_": 1,
        "index_put_": 1,
        "_flash_attention_forward": 1,
        "silu": 1,
    }


def test_decode_step_of_a_7b_models_32_layers_is_430_operations() -> None:
    assert operations_of_a_decode_step(32).total() == 430
