"""Measures the memory of the largest step on a GPU before the KV cache is allocated, as vLLM and nano-vllm do.

The step also loads the kernels of every sampling mode, so that no request waits for them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import MistralForCausalLM

from model_server.compute.gpu.cuda_graphs import batch_sizes
from model_server.compute.gpu.host_device import to_device
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.logprobs import TokenLogprobs
from model_server.compute.runner import Runner, make_kv_cache
from model_server.compute.sampling import sample
from model_server.compute.sequence_sampler import sequence_sampler
from model_server.compute.token_mask import allow_all
from model_server.request import SamplingParams

GRAPH_BYTES = 32 * 2**20
"""Memory reserved for each CUDA graph; vLLM's log shows about 26 MB for a graph of a 7B model."""
WORKSPACE_BYTES = 32 * 2**20
"""cuBLAS's workspace for the stream on which graphs are captured: 8 MB on Ampere, 32 MB on Hopper."""
MAX_LOGPROBS = 20
SAMPLING: list[dict[str, Any]] = [
    {"do_sample": True, "top_k": 0, "top_p": 0.9},
    {"do_sample": True, "top_k": 0, "min_p": 0.05, "repetition_penalty": 1.1},
    {"do_sample": True, "top_k": 40, "top_p": 0.9},
    {"do_sample": True, "top_k": 0},
    {"do_sample": False},
]
"""One entry for each sampling mode; the sequences of the largest step alternate between them."""


def reserved_bytes(model: MistralForCausalLM, *, flash: bool, max_batch_size: int, max_prefill_tokens: int) -> int:
    """Return the bytes that steps and graphs need besides weights and KV cache; 0 on a CPU, which is not measured."""
    if model.device.type != "cuda":
        return 0
    graphs = len(batch_sizes(max_batch_size)) * GRAPH_BYTES + WORKSPACE_BYTES if flash else 0
    return graphs + worst_step_bytes(
        model, flash=flash, max_batch_size=max_batch_size, max_prefill_tokens=max_prefill_tokens
    )


def worst_step_bytes(model: MistralForCausalLM, *, flash: bool, max_batch_size: int, max_prefill_tokens: int) -> int:
    """Run the largest step and return its peak memory in bytes.

    The step decodes a full batch, prefills a chunk, samples with a grammar mask, and reports the log-probabilities of
    output and prompt.
    """
    cache = make_kv_cache(
        model.config,
        model.dtype,
        model.device,
        max_batch_size=max_batch_size + 1,
        num_tokens=max_prefill_tokens + max_batch_size,
        max_sequence_tokens=max_prefill_tokens,
        flash=flash,
    )
    runner = Runner(model, cache)
    chunk = TokenRange(cache.allocate(max_prefill_tokens) or 0, 0, [0] * max_prefill_tokens)
    decode = [TokenRange(cache.allocate(1) or 0, 0, [0]) for _ in range(max_batch_size)]
    samplers = [
        sequence_sampler(
            model,
            [0],
            SamplingParams(generate=SAMPLING[i % len(SAMPLING)], max_new_tokens=1, logprobs=MAX_LOGPROBS),
        )
        for i in range(max_batch_size)
    ]
    torch.cuda.reset_peak_memory_stats(model.device)
    before_bytes = torch.cuda.memory_allocated(model.device)
    logits = runner.forward(decode, [chunk], range(max_batch_size + max_prefill_tokens))
    sampled = sample(
        logits[:max_batch_size],
        samplers,
        torch.Generator(model.device),
        allow_all(max_batch_size, model.config.vocab_size, model.device),
    )
    with torch.inference_mode():
        token_ids = to_device([0] * max_prefill_tokens, model.device, torch.long)
        of_prompt = TokenLogprobs(logits[max_batch_size:], token_ids, [MAX_LOGPROBS] * max_prefill_tokens)
    sampled.read()
    of_prompt.read()
    return torch.cuda.max_memory_allocated(model.device) - before_bytes
