"""The GPU's code on fake CUDA tensors, at Mistral 7B's sizes: no operation mixes devices, and no step waits.

No result is computed, so these tests find no wrong number; a card does (`tests/gpu/`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from benchmarks.checkpoint import SHAPES, random_mistral
from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.logprobs import TokenLogprobs
from model_server.compute.runner import Runner, make_kv_cache
from model_server.compute.sampling import SampledTokens, sample
from model_server.compute.sequence_sampler import SequenceSampler, sequence_sampler
from model_server.compute.token_mask import TokenMask, allow_all
from model_server.engine.unbatched.generate import generate
from model_server.loading import loader, safetensors, weights
from model_server.loading.safetensors import StoredTensor
from model_server.request import SamplingParams
from tests.support.engine_requests import GREEDY, request
from tests.support.fake_gpu import CUDA, FakeGPU, GPUError
from tests.support.oracle import BATCHED as SAMPLED

VOCAB_SIZE = SHAPES["2b"]["vocab_size"]
WATERMARK = "watermarking_config"
TOGETHER: list[dict[str, Any]] = [
    GREEDY,
    GREEDY | {"repetition_penalty": 1.3},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_k": 0, "temperature": 0.7},
    {"do_sample": True, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
    {"do_sample": True, "top_k": 0, "top_p": 0.5},
    {"do_sample": True, "top_k": 290, "repetition_penalty": 1.3},
]
"""Every way to sample sequences together."""


def mistral(gpu: FakeGPU, dtype: torch.dtype = torch.float16) -> MistralForCausalLM:
    """Return the first eight layers of Mistral 7B on the GPU, fused."""
    with gpu.reading():
        model = random_mistral("2b", dtype, "cuda").requires_grad_(False)
    model.generation_config.eos_token_id = 2
    fuse(model)
    return model


def sampler(model: MistralForCausalLM, generate: dict[str, Any], **changes: Any) -> SequenceSampler:
    return sequence_sampler(model, [5, 6, 7] * 4, SamplingParams(generate=generate, max_new_tokens=4, **changes))


def sampled(samplers: list[SequenceSampler], mask: TokenMask | None = None) -> SampledTokens:
    return sample(torch.zeros((len(samplers), VOCAB_SIZE), device=CUDA), samplers, torch.Generator(CUDA), mask)


MISTAKES: dict[str, Callable[[Tensor], object]] = {
    "operands on two devices": lambda x: x + torch.ones(3),
    "a read": lambda x: x.tolist(),
    "a copy to the host": lambda x: x.cpu(),
    "a copy from memory that is not pinned": lambda x: torch.ones(3).to(CUDA, non_blocking=True),
    "a new tensor from a list": lambda x: torch.tensor([1, 2], device=CUDA),
    "an int assigned to one element": lambda x: x.__setitem__(0, 7),
    "a mask as an index": lambda x: x[x > 0],
    "an index on the host": lambda x: x[torch.tensor([0, 1])],
    "a generator of the CPU": lambda x: x.exponential_(generator=torch.Generator("cpu")),
    "tables of 16 bits": lambda x: torch.nn.functional.embedding(x.to(torch.int16), x[:, None]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_that_meta_tensors_do_not_show_are_errors(gpu: FakeGPU, mistake: str) -> None:
    with pytest.raises(GPUError):
        MISTAKES[mistake](torch.zeros(3, device=CUDA))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_server_starts_on_an_a10g_without_a_fallback(gpu: FakeGPU, dtype: torch.dtype) -> None:
    """Checks flash attention, runs the largest step, divides the memory, chooses the splits and captures the graphs."""
    loaded: Any = SimpleNamespace(model=mistral(gpu, dtype), device=CUDA, dtype=dtype, max_model_len=4096)
    with gpu.reading():
        runner, budget = loader._make_runner(loaded, 8, loader.max_prefill_tokens(CUDA))

    assert runner.missing_features == []
    assert runner.graphs is not None
    assert budget.max_batch_size == 8
    decode = [TokenRange(100 * i, 5, [3]) for i in range(3)]
    tokens = torch.zeros(3, dtype=torch.long, device=CUDA)
    assert runner.forward(decode, [], range(3), tokens).shape == (3, VOCAB_SIZE)


@pytest.mark.parametrize(("dtype", "staging_bytes"), [(torch.float16, safetensors.CHUNK_BYTES), (torch.bfloat16, 0)])
def test_bfloat16_weights_are_converted_on_the_gpu(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype, staging_bytes: int
) -> None:
    """The weights are allocated once, in their final memory and format."""
    monkeypatch.setattr(safetensors, "_read_bytes", lambda fd, buffer, offset: buffer.nbytes)
    config = MistralConfig(**SHAPES["2b"], sliding_window=None)

    with gpu.reading():  # the start waits for its copies
        model = weights._empty_model(config, dtype, CUDA)
        weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        assert weight_bytes <= gpu.allocated_bytes < 1.001 * weight_bytes
        gpu.reset_peak()
        for parameter in model.parameters():
            stored = StoredTensor(tmp_path, torch.bfloat16, tuple(parameter.shape), 0)
            assert sum(safetensors._read_one(0, stored, parameter.data)) == parameter.nbytes
    assert gpu.peak_bytes - gpu.allocated_bytes == staging_bytes


def test_only_a_cpu_has_computed_when_a_forward_returns(gpu: FakeGPU, model: MistralForCausalLM) -> None:
    cache: Any = None

    assert Runner(mistral(gpu), cache).is_async
    assert not Runner(model, cache).is_async


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "dense"])
@pytest.mark.parametrize("window", [None, 1024])
def test_forward_waits_for_nothing(gpu: FakeGPU, flash: bool, window: int | None) -> None:
    model = mistral(gpu)
    model.config.sliding_window = window
    cache = make_kv_cache(
        model.config, model.dtype, CUDA, max_batch_size=4, num_tokens=9000, max_sequence_tokens=2048, flash=flash
    )
    runner = Runner(model, cache)
    first, second, third = (cache.allocate(2048) or 0 for _ in range(3))
    decode = [TokenRange(first, 1500, [3]), TokenRange(second, 5, [4])]
    fed = torch.zeros(2, dtype=torch.long, device=CUDA)
    chunk, draft = TokenRange(third, 1000, [0] * 512), TokenRange(third, 70, [3, 4, 5])

    assert runner.forward([], [chunk], [511]).shape == (1, VOCAB_SIZE)
    assert runner.forward([], [chunk], []).shape == (0, VOCAB_SIZE)
    assert runner.forward(decode, [chunk], [0, 1, 513], fed).shape == (3, VOCAB_SIZE)
    assert runner.forward(decode, [draft], [0, 1, 2, 3, 4]).shape == (5, VOCAB_SIZE)
    cache.copy(first, second, 100)
    assert runner.forward(decode, [], [0, 1], fed).shape == (2, VOCAB_SIZE)


def test_sequences_sampled_together_wait_for_nothing(gpu: FakeGPU) -> None:
    model = mistral(gpu)
    samplers = [
        sampler(model, kind, seed=i if i % 2 else None, logprobs=3 if i % 3 else None, presence_penalty=i % 2)
        for i, kind in enumerate(TOGETHER)
    ]
    some = allow_all(2, VOCAB_SIZE, CUDA)

    for mask in (None, allow_all(len(samplers), VOCAB_SIZE, CUDA), TokenMask([1, 4], some.bits)):
        assert sampled(samplers, mask).on_device.shape == (len(samplers),)
    TokenLogprobs(torch.zeros((2, VOCAB_SIZE), device=CUDA), torch.zeros(2, dtype=torch.long, device=CUDA), [0, 5])


@pytest.mark.parametrize("kind", SAMPLED, ids=str)
def test_every_parameter_of_the_batch_samples_on_the_gpu(gpu: FakeGPU, kind: dict[str, Any]) -> None:
    """A sampler is built without a wait, except for a watermark, whose table a generator of the GPU draws."""
    model = mistral(gpu)
    gpu.may_read = WATERMARK in kind
    one = sampler(model, kind, seed=1, logprobs=2)
    gpu.may_read = not one.batchable

    tensors = [value for p in one.processors for value in vars(p).values() if isinstance(value, Tensor)]
    assert all(tensor.device == CUDA for tensor in tensors), "every step would copy them"
    for mask in (None, allow_all(1, VOCAB_SIZE, CUDA)):
        sampled([one], mask).append_to([one])


def test_token_known_on_the_host_joins_the_history_without_a_wait(gpu: FakeGPU) -> None:
    one = sampler(mistral(gpu), GREEDY | {"no_repeat_ngram_size": 2})

    one.append(7)
    one.append(torch.tensor(7, pin_memory=True).to(CUDA, non_blocking=True))

    assert one.tokens.shape == (1, 14)


@pytest.mark.parametrize("kind", [{"num_beams": 3}, {"guidance_scale": 1.5}, {"use_cache": False}], ids=str)
def test_fallback_generates_on_the_gpu(gpu: FakeGPU, kind: dict[str, Any]) -> None:
    with gpu.reading():
        generate(mistral(gpu), None, one := request(2, sampling={"generate": GREEDY | kind}), wake=lambda: None)

    assert one.num_output_tokens > 0
