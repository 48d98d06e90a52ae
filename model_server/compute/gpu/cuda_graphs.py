"""CUDA graphs of the decode step: a step of a fixed batch size is captured once and replayed as one launch.

A decode step of a 7B model is some 600 kernels, and Python launches them more slowly than a GPU runs them. Steps that
prefill run without graphs: they are long, and no two are alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model_server.compute.decoder import Decoder
from model_server.compute.gpu.host_device import on_host, to_device
from model_server.compute.gpu.streams import HIGH_PRIORITY
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache, ContiguousStep, StepMetadata


def batch_sizes(max_batch_size: int) -> list[int]:
    """Return the batch sizes that get a graph; a step runs in the next larger one, padded.

    Steps of 8 up to 64, of 16 up to 128, of 32 above: a graph takes memory and start-up time, and padding costs less
    in a larger batch.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_batch_size, 32)]
    return [*(size for size in sizes if size < max_batch_size), max_batch_size]


class StaticStep:
    """A decode step of a fixed batch size, in tensors that keep their addresses."""

    def __init__(
        self, decoder: Decoder, cache: ContiguousKVCache, batch_size: int, num_splits: int | None = None
    ) -> None:
        self.batch_size = batch_size
        self.num_splits = num_splits
        self._decoder = decoder
        self._cache = cache
        metadata = self._metadata([])
        self._on_device = to_device(metadata.values, cache.device, torch.int32)
        self._step = ContiguousStep(cache, metadata, self._on_device, num_splits=num_splits)
        self._wanted = torch.arange(batch_size, device=cache.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def capture(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """Capture the step as a graph with memory from `pool`; without a graph every run launches its kernels."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a first run outside the graph: kernels load, libraries take their workspace
            self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._logits = self._compute()
        self._graph = graph

    def run(self, decode: Sequence[TokenRange], tokens: Tensor | None = None) -> Tensor:
        """Return the logits after each range's token, (ranges, vocab_size); valid until the next run.

        `tokens`, (ranges,) on the device, replace the ranges' own token ids.
        """
        values = on_host(self._metadata(decode).values, self._cache.device, torch.int32)
        self._on_device.copy_(values, non_blocking=True)
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

    def _metadata(self, decode: Sequence[TokenRange]) -> StepMetadata:
        return StepMetadata(decode, [], null_slot=self._cache.null_slot, pad_decode_to=self.batch_size)


class DecodeGraphs:
    """Static steps of growing batch sizes; `run` takes the smallest that is large enough."""

    def __init__(
        self,
        decoder: Decoder,
        cache: ContiguousKVCache,
        max_batch_size: int,
        num_splits: Mapping[int, int | None] | None = None,
    ) -> None:
        """Make a static step for each batch size; `num_splits` by batch size as `split_kv` has chosen."""
        sizes = batch_sizes(max_batch_size)
        self.steps = [StaticStep(decoder, cache, size, (num_splits or {}).get(size)) for size in sizes]

    def capture(self) -> None:
        """Capture all sizes, the largest first, so that the others reuse its memory in the pool.

        On one side stream: cuBLAS keeps a workspace for every stream that it has been used on (8 MB on Ampere, 32 MB on
        Hopper) and never frees it. The stream has the priority of the batch's: a graph's kernels keep the priority of
        the stream that they were captured on, whatever stream the graph is replayed on.
        """
        current, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(priority=HIGH_PRIORITY)
        try:
            for step in reversed(self.steps):
                step.capture(pool, stream)
        except RuntimeError:
            # PyTorch's allocator is not told of a capture that fails: it would refuse to free memory from then on.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream current

    def run(self, decode: Sequence[TokenRange], tokens: Tensor | None = None) -> Tensor:
        """See `StaticStep.run`."""
        return next(step for step in self.steps if step.batch_size >= len(decode)).run(decode, tokens)
