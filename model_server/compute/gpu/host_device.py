"""Asynchronous copies between host and device through pinned memory.

`torch.tensor(values, device=...)` and `tolist` wait until the device has finished all earlier work; these copies do
not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers as a tensor on a device; the copy is queued after earlier work."""
    return on_host(values, device, dtype).to(device, non_blocking=True)


def on_host(values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers as a tensor on the host, pinned if the device is a GPU."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


class AsyncHostCopy:
    """A copy of a tensor to the host, queued on the device after the work that computes the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._on_host = tensor
        self._copied: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._on_host.copy_(tensor, non_blocking=True)
            # `blocking` makes the waiting thread sleep. Otherwise `synchronize` would spin and use up a core.
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def wait(self) -> None:
        """Wait until the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def read(self) -> list[Any]:
        """Wait for the copy and return its values."""
        self.wait()
        values: list[Any] = self._on_host.tolist()
        return values
