"""CUDA streams for the engine's two threads, so that a long prefill of the fallback does not block the batch."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

HIGH_PRIORITY, DEFAULT_PRIORITY = -1, 0


def batch_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return a context for the batch thread: a stream whose kernels the GPU schedules first."""
    return _stream(device, HIGH_PRIORITY)


def fallback_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return a context for the fallback thread: a stream of default priority."""
    return _stream(device, DEFAULT_PRIORITY)


def _stream(device: torch.device, priority: int) -> AbstractContextManager[object]:
    """Return a stream context for one thread. The threads share only the weights, and only read them."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device, priority=priority))
