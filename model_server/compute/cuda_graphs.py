"""CUDA graphs of the decode step: a step of a fixed number of rows is recorded once and replayed as one launch.

A decode step of a 7B model is some 600 kernels, which Python launches more slowly than a GPU runs them. Prompts are
read without graphs: their steps are long and never twice the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model_server.compute.decoder import Decoder
from model_server.compute.host_device import on_host, to_device
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache, SpanStep, StepMetadata


def sizes_up_to(max_rows: int) -> list[int]:
    """Return the numbers of rows worth a graph: a step runs in the next larger one, with rows nobody reads."""
    return sorted({min(size, max_rows) for size in (1, 2, 4, *range(8, max_rows + 8, 8))})


class StaticStep:
    """A decode step of a fixed number of rows, in tensors that stay where they are."""

    def __init__(self, decoder: Decoder, spans: ContiguousKVCache, num_rows: int) -> None:
        self.num_rows = num_rows
        self._decoder = decoder
        self._spans = spans
        numbers = self._numbers([])
        self._on_device = to_device(numbers.values, spans.device, torch.int32)
        self._step = SpanStep(spans, numbers, self._on_device)
        self._wanted = torch.arange(num_rows, device=spans.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def record(self, pool: Any) -> None:
        """Record the step as a graph whose memory comes from `pool`; without it every run launches its kernels."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # a first run, unrecorded: kernels load and libraries take their workspace
            self._compute()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._logits = self._compute()
        self._graph = graph

    def run(self, decode: Sequence[TokenRange], tokens: Tensor | None = None) -> Tensor:
        """Return the logits after each segment's token, (segments, vocab_size); valid until the next run.

        `tokens`, (segments,) on the device, stand in place of those that the segments have.
        """
        numbers = on_host(self._numbers(decode).values, self._spans.device, torch.int32)
        self._on_device.copy_(numbers, non_blocking=True)
        if tokens is not None:
            self._step.token_ids[: len(tokens)] = tokens
        if self._graph is None:
            self._logits = self._compute()
        else:
            self._graph.replay()
        assert self._logits is not None
        return self._logits[: len(decode)]

    def _compute(self) -> Tensor:
        return self._decoder(self._step, self._wanted)

    def _numbers(self, decode: Sequence[TokenRange]) -> StepMetadata:
        return StepMetadata(decode, [], unused=self._spans.num_tokens, pad_decode_to=self.num_rows)


class DecodeGraphs:
    """Static steps of growing sizes; `run` takes the smallest that holds the rows."""

    def __init__(self, decoder: Decoder, spans: ContiguousKVCache, max_rows: int) -> None:
        self._steps = [StaticStep(decoder, spans, size) for size in sizes_up_to(max_rows)]

    def record(self) -> None:
        """Record all sizes, the largest first, so that the others find its memory in the pool."""
        pool = torch.cuda.graph_pool_handle()
        for step in reversed(self._steps):
            step.record(pool)

    def run(self, decode: Sequence[TokenRange], tokens: Tensor | None = None) -> Tensor:
        """See `StaticStep.run`."""
        return next(step for step in self._steps if step.num_rows >= len(decode)).run(decode, tokens)
