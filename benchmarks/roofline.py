"""A decode step beside the hardware's limits: memory bandwidth, and the step's matmuls alone. No server, no HTTP.

On a CPU a model of 100M parameters decodes, on a GPU Mistral 7B's shape with random weights made on the card.
A step must read every weight but the embedding table, and every sequence's keys and values, at least once
(`of_bandwidth`), and must multiply every weight matrix (`of_matmuls`).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import report
from benchmarks.checkpoint import random_mistral
from benchmarks.figures import Figure, spread
from model_server.compute.cpu.packed_linear import pack
from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.base import TokenRange, head_dim, kv_bytes_per_token
from model_server.compute.kv_cache.flash_check import flash_attention_unavailable_reason
from model_server.compute.runner import Runner, make_kv_cache
from model_server.loading.device import free_bytes


@dataclass(frozen=True)
class Plan:
    device: str
    shape: str
    dtype: str
    prompt_lengths: Sequence[int]
    """For the time to first token."""
    batch_sizes: Sequence[int] = (1, 8, 32, 64)
    contexts: Sequence[int] = (64,)
    """Tokens of each sequence before its first step."""
    steps: int = 32
    seconds: float = 1.0
    """Budget of one point."""


CPU = Plan("cpu", "100m", "bfloat16", (64, 256, 1024))
GPU = Plan("cuda", "7b", "float16", (128, 1024, 4096), contexts=(128, 1024, 4096), steps=64)


def default_plan(*, quick: bool = False) -> Plan:
    plan = GPU if torch.cuda.is_available() else CPU
    if not quick:
        return plan
    return dataclasses.replace(plan, prompt_lengths=plan.prompt_lengths[:1], batch_sizes=(1, 8, 32), steps=8)


class RunnerDecoder:
    """This server's runner with the KV cache that the server would give it."""

    def __init__(self, model: Any, batch_size: int, max_len: int) -> None:
        config, dtype, device = model.config, model.dtype, model.device
        flash = flash_attention_unavailable_reason(config, dtype, device) is None
        cache = make_kv_cache(
            config, dtype, device, max_batch_size=batch_size, num_tokens=batch_size * max_len,
            max_sequence_tokens=max_len, flash=flash,
        )  # fmt: skip
        self._runner = Runner(model, cache)
        self._runner.capture_graphs(batch_size)
        self._offsets = [cache.allocate(max_len) or 0 for _ in range(batch_size)]

    def prefill(self, prompt: Sequence[int]) -> int:
        return int(self._runner.forward([], [TokenRange(self._offsets[0], 0, prompt)], [len(prompt) - 1]).argmax())

    def start(self, batch_size: int, context: int) -> None:
        """Decode from here on for so many sequences whose keys and values are zeros: the bytes that are read count."""
        self._next, self._lengths = [3] * batch_size, [context] * batch_size

    def step(self) -> list[int]:
        batch = zip(self._offsets, self._lengths, self._next, strict=False)
        ranges = [TokenRange(offset, length, [token]) for offset, length, token in batch]
        self._next = self._runner.forward(ranges, [], range(len(ranges))).argmax(-1).tolist()
        self._lengths = [length + 1 for length in self._lengths]
        return self._next


class Matmuls:
    """The fused weight matrices of a model, multiplied in their order and with nothing between them."""

    def __init__(self, model: Any) -> None:
        config = model.config
        hidden, attention = config.hidden_size, config.num_attention_heads * head_dim(config)
        self.projections: list[tuple[Any, int]] = []
        for layer in model.model.layers:
            attn, mlp = layer.self_attn, layer.mlp
            self.projections += [(attn.qkv, hidden), (attn.o_proj, attention)]
            self.projections += [(mlp.gate_up, hidden), (mlp.down_proj, config.intermediate_size)]
        self.projections.append((model.lm_head, hidden))
        self._new = functools.partial(torch.randn, dtype=model.dtype, device=model.device)

    @torch.inference_mode()
    def run(self, batch_size: int) -> None:
        inputs = {width: self._new((batch_size, width)) for width in {width for _, width in self.projections}}
        for projection, width in self.projections:
            projection(inputs[width])


def measure(plan: Plan) -> list[Figure]:
    """Return the limits, and what this server's runner reaches of them."""
    report.progress.print(f"roofline: {plan.shape} on {plan.device}")
    bandwidth = _bytes_per_s(plan.device)
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # as the server does
    model: Any = random_mistral(plan.shape, getattr(torch, plan.dtype), plan.device)
    # Counted before `pack`, which turns parameters into oneDNN's own format.
    weight_bytes = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    fuse(model)
    pack(model)
    gc.freeze()  # as the server does
    figures: list[Figure] = [{"what": "bandwidth", "bytes_per_s": bandwidth}]
    for context in plan.contexts:
        figures += _decode(model, context, plan, weight_bytes, bandwidth)
    figures += [_first_token(model, length, plan) for length in plan.prompt_lengths]
    what = {"benchmark": "roofline", "device": plan.device, "shape": plan.shape, "dtype": plan.dtype}
    return [{**what, **figure} for figure in figures]


def _decode(model: Any, context: int, plan: Plan, weight_bytes: int, bandwidth: dict[str, float]) -> Iterator[Figure]:
    """Yield the rate of each batch size whose keys and values fit into memory."""
    torch.cuda.empty_cache()  # the allocator keeps the last KV cache, and the device calls that memory used
    max_len = context + plan.steps + 8
    token_bytes = kv_bytes_per_token(model.config, model.dtype)
    fits = [n for n in plan.batch_sizes if n * max_len * token_bytes < 0.85 * free_bytes(model.device)]
    if not fits:
        return
    decoder, measured = RunnerDecoder(model, max(fits), max_len), max(bandwidth["read"], bandwidth["copy"])
    for size in fits:
        report.progress.print(f"roofline: decode, {size} sequences of {context} tokens")
        decoder.start(size, context)
        step_s, matmuls_s = in_turn(decoder.step, functools.partial(Matmuls(model).run, size), plan)
        rate = spread(size / seconds for seconds in step_s)
        num_bytes = weight_bytes + size * (context + len(step_s) // 2) * token_bytes
        of_data_sheet = {}
        if "data sheet" in bandwidth:
            of_data_sheet["of_data_sheet"] = rate["median"] * num_bytes / size / bandwidth["data sheet"]
        yield {
            "what": "decode",
            "batch_size": size,
            "context": context,
            "tokens_per_s": rate,
            "of_matmuls": statistics.median(matmuls_s) / statistics.median(step_s),
            "of_bandwidth": rate["median"] * num_bytes / size / measured,
            **of_data_sheet,
            "bandwidth_allows_tokens_per_s": size * measured / num_bytes,
        }


def _first_token(model: Any, length: int, plan: Plan) -> Figure:
    report.progress.print(f"roofline: first token after {length} tokens")
    draw = random.Random(0)
    prompt = [draw.randrange(3, model.config.vocab_size) for _ in range(length)]
    prefill = functools.partial(RunnerDecoder(model, 1, length + 1).prefill, prompt)
    return {"what": "first token", "prompt_tokens": length, "first_token_s": spread(_times_s(prefill, plan.device))}


def in_turn(step: Callable[[], object], matmuls: Callable[[], object], plan: Plan) -> tuple[list[float], list[float]]:
    """Return the times of steps and of matmuls, each step followed by its matmuls: a machine's speed changes."""
    times_s: tuple[list[float], list[float]] = ([], [])
    step(), matmuls()  # warm-up
    began_s = time.perf_counter()
    while len(times_s[0]) < plan.steps and (len(times_s[0]) < 3 or time.perf_counter() - began_s < 2 * plan.seconds):
        for work, taken in zip((step, matmuls), times_s, strict=True):
            taken.append(_time_s(work, plan.device))
    return times_s


def _bytes_per_s(device: str) -> dict[str, float]:
    """Return the bandwidth of reading memory, of copying it (bytes read and written both count), and on paper."""
    num_bytes = (4 if device == "cuda" else 1) << 29  # far beyond any cache
    source = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    read_s, copy_s = _times_s(source.sum, device), _times_s(lambda: copy.copy_(source), device)
    rates = {"read": num_bytes / min(read_s), "copy": 2 * num_bytes / min(copy_s)}
    if device == "cuda":  # as data sheets compute it: two transfers a clock, the clock in kHz and the width in bits
        properties = torch.cuda.get_device_properties(0)
        rates["data sheet"] = 2 * 1000 * properties.memory_clock_rate * properties.memory_bus_width / 8
    return rates


def _times_s(work: Callable[[], object], device: str) -> list[float]:
    work()  # warm-up
    return [_time_s(work, device) for _ in range(3)]


def _time_s(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began_s = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


def card(figures: Sequence[Figure]) -> None:
    """Print the limits, and what a decode step and a prefill reach."""
    bandwidth, *rest = figures
    rates = [[name, f"{rate / 1e9:.1f}"] for name, rate in bandwidth["bytes_per_s"].items()]
    report.table(f"Memory bandwidth ({bandwidth['device']})", ["", "GB/s"], rates)
    rows = [
        [f"{f['batch_size']} x {f['context']}", report.measured(f["tokens_per_s"])]
        + [f"{f[of]:.0%}" if of in f else "-" for of in ("of_matmuls", "of_bandwidth", "of_data_sheet")]
        for f in rest
        if f["what"] == "decode"
    ]
    columns = ["sequences x tokens", "tokens/s", "of matmuls", "of bandwidth", "of data sheet"]
    report.table("A decode step without a server", columns, rows)
    first = [figure for figure in rest if figure["what"] == "first token"]
    rows = [[str(f["prompt_tokens"]), report.measured(f["first_token_s"], scale=1000)] for f in first]
    report.table("Time to first token of one prompt", ["prompt tokens", "ms"], rows)
