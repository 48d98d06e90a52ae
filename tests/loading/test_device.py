"""The device, the number format and the free memory that a start resolves to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model_server.errors import StartupError
from model_server.loading import device
from model_server.loading.device import cpu_computes_bfloat16, free_bytes, resolve_device

DRIVER_TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading..."
)
"""The error of `torch.cuda.init` for cudaErrorInsufficientDriver (c10/cuda/CUDAFunctions.cpp)."""


@pytest.fixture
def without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CUDA that cannot be used; returns the path of the driver's device file, which is not there."""

    def init() -> None:
        raise RuntimeError(DRIVER_TOO_OLD)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(device, "NVIDIA_CONTROL", tmp_path / "nvidiactl")
    return tmp_path / "nvidiactl"


@pytest.mark.usefixtures("without_cuda")
def test_gpu_whose_driver_is_too_old_stops_the_start() -> None:
    """The server started on the CPU instead: Ready, and a hundred times slower."""
    with pytest.raises(StartupError) as caught:
        resolve_device({"NVIDIA_VISIBLE_DEVICES": "GPU-4cf8db2d"})

    sentence = str(caught.value)
    assert "NVIDIA_VISIBLE_DEVICES=GPU-4cf8db2d" in sentence
    assert "driver on your system is too old (found version 12020)" in sentence
    assert "NVIDIA driver 580 or later" in sentence
    assert "\n" not in sentence


def test_driver_without_cuda_stops_the_start(without_cuda: Path) -> None:
    without_cuda.touch()

    with pytest.raises(StartupError, match="nvidiactl exists"):
        resolve_device({})


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("visible", [None, "", "void", "none"])
def test_machine_without_a_gpu_serves_on_the_cpu(visible: str | None) -> None:
    environ = {} if visible is None else {"NVIDIA_VISIBLE_DEVICES": visible}

    assert resolve_device(environ) == (torch.device("cpu"), "no CUDA device was found")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpu_that_the_operator_hides_is_not_expected(without_cuda: Path, hidden: str) -> None:
    without_cuda.touch()

    assert resolve_device({"CUDA_VISIBLE_DEVICES": hidden})[0] == torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("flags : fpu avx512f avx512_bf16", True),
        ("Features : fp asimd bf16", True),
        ("flags : fpu avx2", False),
    ],
)
def test_auto_is_bfloat16_only_if_the_cpu_computes_it(flags: str, native: bool, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nmodel name : bf16 maker\n{flags}\n")
    assert cpu_computes_bfloat16(cpuinfo) is native


def test_limit_of_the_container_bounds_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200000\n")
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    assert free_bytes(torch.device("cpu")) == 500000
