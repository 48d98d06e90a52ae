"""A model's decode loop without a server around it: Transformers' own forward, and this server's runner.

Greedy, all rows in step, timed token by token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.ceilings import wait_for
from model_server.compute.fused_linear import fuse, pack
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import flash_attention_unavailable_reason
from model_server.compute.runner import Runner, make_kv_cache


class Decoder(Protocol):
    """Rows that go on token by token; each call returns the rows' next tokens, read back from the device."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]: ...

    def step(self) -> list[int]: ...


MakeDecoder = Callable[[int, int], Decoder]
"""Given the number of rows and the most tokens one may get to."""


def transformers_loop(model: Any) -> MakeDecoder:
    return lambda rows, max_len: TransformersDecoder(model)


def our_loop(model: Any) -> MakeDecoder:
    """Prepare the model as the server does; it is changed in place, so measure it as it was before."""
    fuse(model)
    pack(model)
    return lambda rows, max_len: RunnerDecoder(model, rows=rows, max_len=max_len)


class TransformersDecoder:
    """The model's own forward with its default cache: what `generate` runs, without its bookkeeping."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        self._cache = None
        return self._forward(torch.tensor(prompts, device=self._model.device))

    def step(self) -> list[int]:
        return self._forward(self._next)

    @torch.inference_mode()
    def _forward(self, token_ids: torch.Tensor) -> list[int]:
        output = self._model(input_ids=token_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        self._next = output.logits[:, -1].argmax(-1, keepdim=True)
        found: list[int] = self._next[:, 0].tolist()
        return found


class RunnerDecoder:
    """This server's runner with the memory that the server would give it."""

    def __init__(self, model: Any, *, rows: int, max_len: int) -> None:
        config, dtype, device = model.config, model.dtype, model.device
        memory = make_kv_cache(
            config,
            dtype,
            device,
            num_rows=rows,
            num_tokens=rows * max_len,
            max_sequence_tokens=max_len,
            flash=flash_attention_unavailable_reason(config, dtype, device) is None,
        )
        self._runner = Runner(model, memory)
        self._runner.record_graphs(rows)
        self._places = [memory.allocate(max_len) or 0 for _ in range(rows)]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        self._next = [
            int(self._runner.forward([], [TokenRange(place, 0, prompt)], [len(prompt) - 1]).argmax())
            for place, prompt in zip(self._places, prompts, strict=True)
        ]
        self._lengths = [len(prompt) for prompt in prompts]
        return self._next

    def step(self) -> list[int]:
        segments = [
            TokenRange(place, length, [token])
            for place, length, token in zip(self._places, self._lengths, self._next, strict=True)
        ]
        self._next = self._runner.forward(segments, [], range(len(segments))).argmax(-1).tolist()
        self._lengths = [length + 1 for length in self._lengths]
        return self._next


def step_times_s(
    decoder: Decoder, prompts: Sequence[Sequence[int]], *, steps: int, budget_s: float, beside: Callable[[], object]
) -> tuple[list[float], list[float]]:
    """Read the prompts, then return the time of each of up to `steps` steps, and of `beside` after each of them.

    In turn, since a machine's speed changes: at least three of each, more while time is left.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder.prefill(prompts)
    decoder.step()
    beside()
    wait_for(device)
    began_s = time.perf_counter()
    step_s: list[float] = []
    beside_s: list[float] = []
    while len(step_s) < steps and (len(step_s) < 3 or time.perf_counter() - began_s < budget_s):
        for work, taken in ((decoder.step, step_s), (beside, beside_s)):
            start_s = time.perf_counter()
            work()
            wait_for(device)
            taken.append(time.perf_counter() - start_s)
    return step_s, beside_s


def profile_steps(decoder: Decoder, prompts: Sequence[Sequence[int]], steps: int = 4) -> list[dict[str, Any]]:
    """Return where a step's time goes: operators with their own milliseconds a step and their share, most first."""
    decoder.prefill(prompts)
    decoder.step()
    on_card = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            decoder.step()
    attribute = "self_device_time_total" if on_card else "self_cpu_time_total"
    own_us = {event.key: getattr(event, attribute) for event in recorded.key_averages()}
    total_us = sum(own_us.values())
    return [
        {"operator": name, "ms": us / 1000 / steps, "share": us / total_us}
        for name, us in sorted(own_us.items(), key=lambda item: -item[1])
    ]
