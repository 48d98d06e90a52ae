"""Copies between host and device: values and asynchrony; `tests/gpu/test_kernels.py` tests them on a GPU."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

from model_server.compute.gpu.host_device import AsyncHostCopy, to_device

CPU = torch.device("cpu")


def test_values_and_types_survive_the_copy() -> None:
    copied = to_device([3, 1, 2], CPU, torch.int32)
    assert (copied.dtype, copied.tolist()) == (torch.int32, [3, 1, 2])
    assert to_device([0.5], CPU).dtype == torch.float32
    assert AsyncHostCopy(copied).read() == [3, 1, 2]


def test_copy_to_an_accelerator_does_not_block() -> None:
    """Without a GPU, the test checks the call that PyTorch receives on the meta device."""
    meta = torch.device("meta")
    calls: list[dict[str, object]] = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.Tensor.to:
                calls.append(kwargs)
            return func(*args, **(kwargs or {}))

    with Recorder():
        to_device([1, 2], meta)
    assert calls == [{"non_blocking": True}]
