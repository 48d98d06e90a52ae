"""CUDA streams of the engine's two threads, so that a fallback's long prefill does not stop the batch."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

HIGH_PRIORITY, DEFAULT_PRIORITY = -1, 0


def batch_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return the context of the thread that runs batched steps: a stream whose kernels the GPU schedules first."""
    return _stream(device, HIGH_PRIORITY)


def fallback_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return the context of the thread that runs `generate` calls."""
    return _stream(device, DEFAULT_PRIORITY)


def _stream(device: torch.device, priority: int) -> AbstractContextManager[object]:
    """Return a stream for one thread. Tensors stay within their thread, and both threads only read the weights."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device, priority=priority))
