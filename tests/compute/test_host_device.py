"""Numbers on their way between host and device, as far as there is one of each (`test_gpu.py` has the rest)."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

from model_server.compute.host_device import AsyncHostCopy, to_device

CPU = torch.device("cpu")


def test_numbers_arrive_as_they_were_sent() -> None:
    there = to_device([3, 1, 2], CPU, torch.int32)
    assert (there.dtype, there.tolist()) == (torch.int32, [3, 1, 2])
    assert to_device([0.5], CPU).dtype == torch.float32
    assert AsyncHostCopy(there).read() == [3, 1, 2]


def test_what_goes_to_an_accelerator_is_not_waited_for() -> None:
    """Without a card: asked of PyTorch's own calls, on the device that has no memory."""
    meta = torch.device("meta")
    calls: list[dict[str, object]] = []

    class Noting(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.Tensor.to:
                calls.append(kwargs)
            return func(*args, **(kwargs or {}))

    with Noting():
        to_device([1, 2], meta)
    assert calls == [{"non_blocking": True}]
