"""Copies between host and device: values and types; `tests/gpu/test_kernels.py` tests them on a GPU."""

from __future__ import annotations

import torch

from model_server.compute.gpu.host_device import AsyncHostCopy, to_device

CPU = torch.device("cpu")


def test_values_and_types_survive_the_copy() -> None:
    copied = to_device([3, 1, 2], CPU, torch.int32)
    assert (copied.dtype, copied.tolist()) == (torch.int32, [3, 1, 2])
    assert to_device([0.5], CPU).dtype == torch.float32
    assert AsyncHostCopy(copied).read() == [3, 1, 2]
