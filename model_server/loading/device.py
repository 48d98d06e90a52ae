"""Chooses the device and the number format at the start, each with a reason, and measures the free memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from model_server.errors import StartupError
from model_server.loading.checkpoint import one_line

CGROUP = Path("/sys/fs/cgroup")
NVIDIA_CONTROL = Path("/dev/nvidiactl")
"""The NVIDIA driver's device file: there on every machine, and in every container, that has been given a GPU."""


def resolve_device(environ: Mapping[str, str] = os.environ) -> tuple[torch.device, str]:
    """Return the device to compute on, and why.

    Raises:
        StartupError: there is a GPU and CUDA cannot use it, usually because the driver is too old. A 7B model on the
            CPU in its place would look healthy and be a hundred times slower.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of a driver that is too old; the error below says so too
        available = torch.cuda.is_available()
    if available:
        return torch.device("cuda:0"), torch.cuda.get_device_name(0)
    if gpu := _gpu_expected(environ):
        raise StartupError(
            f"There is a GPU ({gpu}), but CUDA cannot use it: {_cuda_error()}. This image needs NVIDIA driver 580 or "
            "later on the node; to serve on the CPU all the same, set CUDA_VISIBLE_DEVICES=-1."
        )
    return torch.device("cpu"), "no CUDA device was found"


def _gpu_expected(environ: Mapping[str, str]) -> str | None:
    """Return the evidence that this process should have a GPU, or None."""
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # the operator has hidden it
        return None
    # The device plugin and NVIDIA's container runtime set it; "void" and "none" mean no GPU.
    visible = environ.get("NVIDIA_VISIBLE_DEVICES", "")
    if visible not in ("", "void", "none"):
        return f"NVIDIA_VISIBLE_DEVICES={visible}"
    return f"{NVIDIA_CONTROL} exists" if NVIDIA_CONTROL.exists() else None


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return one_line(error).rstrip(".")
    return "it reports no device"


def resolve_dtype(choice: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the number format of the weights, and why."""
    if choice != "auto":
        return getattr(torch, choice), "as configured"
    if device.type == "cuda":
        return torch.float16, "the default on CUDA"
    if cpu_computes_bfloat16(Path("/proc/cpuinfo")):
        return torch.bfloat16, "this CPU computes it natively"
    return torch.float32, "this CPU does not compute bfloat16 natively"


def cpu_computes_bfloat16(cpuinfo: Path) -> bool:
    """Return whether the CPU has instructions for bfloat16: AVX-512 BF16 or AMX on x86, BF16 on ARM."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on the device; on a CPU at most what the container may still use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used = int((CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):  # no container, no limit ("max"), or an older kernel
        return free
    return min(free, limit - used)
