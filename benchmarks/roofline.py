"""A decode step beside the hardware's limits: memory bandwidth, and the step's matmuls alone. No server, no HTTP.

On a CPU a model of 100M parameters decodes, on a GPU Mistral 7B's shape with random weights made on the card.
A step must read every weight but the embedding table, and every sequence's keys and values, at least once
(`of_bandwidth`), and must multiply every weight matrix (`of_matmuls`).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import timer

from benchmarks import report
from benchmarks.checkpoint import random_mistral
from benchmarks.figures import Figure, spread
from benchmarks.runner import random_runner
from model_server.compute.kv_cache.base import TokenRange, head_dim, kv_bytes_per_token
from model_server.compute.runner import Runner

BATCH_SIZES, STEPS = (1, 8, 32, 64), 32


def measure(shape: str | None = None) -> list[Figure]:
    """Return the limits, and what this server's runner reaches of them."""
    on_gpu = torch.cuda.is_available()
    device, dtype, default = ("cuda", "float16", "7b") if on_gpu else ("cpu", "bfloat16", "100m")
    contexts = (128, 1024, 4096) if on_gpu else (64,)
    shape = shape or default
    report.progress.print(f"roofline: {shape} on {device}")
    bandwidth = _gb_per_s(device)
    runner = random_runner(Runner, shape, dtype, device, max_batch_size=max(BATCH_SIZES), max_len=max(contexts) + 1)
    # On the meta device, because the runner keeps some weights in oneDNN's own format.
    parameters = random_mistral(shape, runner.model.dtype, "meta").named_parameters()
    weight_bytes = sum(parameter.nbytes for name, parameter in parameters if "embed_tokens" not in name)
    figures: list[Figure] = [{"benchmark": "bandwidth", "device": device, **bandwidth}]
    for context, batch_size in itertools.product(contexts, BATCH_SIZES):
        if runner.kv_cache.num_allocatable([context + 1] * batch_size) == batch_size:  # else memory is too small
            what = {"benchmark": "roofline", "device": device, "shape": shape, "dtype": dtype}
            figures.append({**what, **_decode(runner, batch_size, context, weight_bytes, bandwidth)})
    return figures


def _decode(runner: Runner, batch_size: int, context: int, weight_bytes: int, bandwidth: dict[str, float]) -> Figure:
    """Time decode steps and their matmuls in turn, because a machine's speed changes."""
    report.progress.print(f"roofline: decode, {batch_size} sequences of {context} tokens")
    cache, model = runner.kv_cache, runner.model
    # The keys and values are zeros: the bytes that are read count.
    ranges = [TokenRange(cache.allocate(context + 1) or 0, context, [3]) for _ in range(batch_size)]
    matmuls = _matmuls(model, batch_size)

    def step() -> None:
        runner.forward(ranges, [], range(batch_size)).argmax(-1).tolist()

    times_s = [(_time_s(step), _time_s(matmuls)) for _ in range(1 + STEPS)][1:]  # the first is a warm-up
    for one in ranges:
        cache.free(one.kv_offset)
    step_s, matmuls_s = (statistics.median(times) for times in zip(*times_s, strict=True))
    num_bytes = weight_bytes + batch_size * (context + 1) * kv_bytes_per_token(model.config, model.dtype)
    return {
        "batch_size": batch_size,
        "context": context,
        "tokens_per_s": spread(batch_size / seconds for seconds, _ in times_s),
        "of_matmuls": matmuls_s / step_s,
        "of_bandwidth": num_bytes / step_s / 1e9 / max(bandwidth.values()),
    }


def _matmuls(model: Any, batch_size: int) -> Callable[[], None]:
    """Return a call that multiplies the fused weight matrices in their order, with nothing between them."""
    config = model.config

    def inputs(width: int) -> torch.Tensor:
        return torch.randn((batch_size, width), dtype=model.dtype, device=model.device)

    hidden, mlp = inputs(config.hidden_size), inputs(config.intermediate_size)
    heads = inputs(config.num_attention_heads * head_dim(config))
    calls: list[tuple[Any, torch.Tensor]] = []
    for layer in model.model.layers:
        attention, feed_forward = layer.self_attn, layer.mlp
        calls += [(attention.qkv, hidden), (attention.o_proj, heads)]
        calls += [(feed_forward.gate_up, hidden), (feed_forward.down_proj, mlp)]
    calls.append((model.lm_head, hidden))

    @torch.inference_mode()
    def multiply() -> None:
        for projection, x in calls:
            projection(x)

    return multiply


def _gb_per_s(device: str) -> dict[str, float]:
    """Return the bandwidth of reading memory, and of copying it: bytes read and written both count."""
    gb = (4 if device == "cuda" else 1) * 0.5  # far beyond any cache
    source = torch.zeros(int(gb * 1e9) // 4, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    read_s, copy_s = (min(_time_s(work) for _ in range(4)) for work in (source.sum, lambda: copy.copy_(source)))
    return {"read_gb_per_s": gb / read_s, "copy_gb_per_s": 2 * gb / copy_s}


def _time_s(work: Callable[[], object]) -> float:
    began_s = timer()  # which waits for the GPU, as the second call does
    work()
    return timer() - began_s
