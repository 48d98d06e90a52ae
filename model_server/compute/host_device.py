"""Numbers on their way between host and device, for which neither waits: a GPU moves what lies in pinned memory itself.

`torch.tensor(values, device=...)` waits until the device has done all that was launched before, and so does `tolist`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers as a tensor on a device, which takes them when it comes to it."""
    return on_host(values, device, dtype).to(device, non_blocking=True)


def on_host(values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers as a tensor on the host that the device can take."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


class AsyncHostCopy:
    """A tensor's values on their way to the host, behind nothing that is launched later."""

    def __init__(self, tensor: Tensor) -> None:
        self._on_host = tensor
        self._arrival: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._on_host.copy_(tensor, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read(self) -> list[Any]:
        """Wait for the values and return them."""
        if self._arrival is not None:
            self._arrival.synchronize()
        found: list[Any] = self._on_host.tolist()
        return found
