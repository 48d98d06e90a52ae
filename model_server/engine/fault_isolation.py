"""Fault isolation: runs a failed step again in halves until it finds the sequence that makes the step fail."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from model_server.engine.sequence import Sequence
from model_server.engine.step import Batch

logger = logging.getLogger(__name__)

T = TypeVar("T")

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


def isolate_faults(
    batch: Batch, compute: Callable[[Batch], T], fail: Callable[[Sequence], None]
) -> Iterator[tuple[Batch, T]]:
    """Yield the batch with its result; if it fails, yield each part that could be computed, with its result.

    Args:
        compute: computes a batch; it must change nothing when it fails, so that a part can be computed again.
        fail: is called with each sequence that cannot be computed.

    Raises:
        torch.OutOfMemoryError, MemoryError: the step ran out of memory; no single sequence is the cause.
        torch.AcceleratorError: the accelerator fails until the process restarts.
    """
    try:
        result = compute(batch)
    except (*OUT_OF_MEMORY, torch.AcceleratorError):
        raise
    except Exception:
        if len(batch) < 2:
            for sequence in batch.sequences:
                logger.exception("request %s failed in its step", sequence.request.request_id)
                fail(sequence)
            return
    else:
        yield batch, result
        return
    for half in batch.halves():
        yield from isolate_faults(half, compute, fail)
