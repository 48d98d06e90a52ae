"""Reads tensors from safetensors files into their final memory, each byte once.

The peak is the weights themselves. (A mapped file would be held twice as soon as a weight is converted or fused.) Owns
the format's header (https://github.com/huggingface/safetensors#format) and the reading; `weights` matches the tensors
with the model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch
from safetensors import safe_open
from torch import Tensor

CHUNK_BYTES = 8 * 2**20
"""Bytes of one read."""
CONVERTED_BYTES = 2**20
"""Bytes of one read of a tensor that is converted: they stay in the processor's cache until they are."""
THREADS = 4
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Return the float tensors of some safetensors files by name.

    Raises:
        SafetensorError, OSError: a file does not match its header.
    """
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt"):
            pass  # the library's own checks: header, offsets, length of the file
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = orjson.loads(stream.read(header_bytes))
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in DTYPES:
                start = 8 + header_bytes + entry["data_offsets"][0]
                tensors[name] = StoredTensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return tensors


def read_all(targets: Mapping[str, tuple[StoredTensor, Tensor]], on_bytes: Callable[[int], None]) -> None:
    """Fill each target from its stored tensor, several at a time; calls `on_bytes` with the size of each read.

    Raises:
        OSError: a file cannot be read, or ends early.
    """
    lock = threading.Lock()

    def read(job: tuple[StoredTensor, Tensor]) -> None:
        stored, target = job
        with stored.file.open("rb", buffering=0) as stream:
            for num_bytes in _read_one(stream.fileno(), stored, target):
                with lock:
                    on_bytes(num_bytes)

    # In the order of the files, so that the disk reads sequentially.
    jobs = sorted(targets.values(), key=lambda job: (job[0].file, job[0].start))
    with ThreadPoolExecutor(THREADS, thread_name_prefix="read-weights") as pool:
        list(pool.map(read, jobs))


def _read_one(fd: int, stored: StoredTensor, target: Tensor) -> Iterator[int]:
    """Fill one target; yield the bytes of each read."""
    if target.device.type == "cpu" and target.dtype == stored.dtype:
        yield _read_bytes(fd, target.view(-1).view(torch.uint8), stored.start)
        return
    flat = target.view(-1)
    on_cpu = target.device.type == "cpu"
    step = (CONVERTED_BYTES if on_cpu else CHUNK_BYTES) // stored.dtype.itemsize
    staging = torch.empty(step, dtype=stored.dtype, pin_memory=not on_cpu)
    # Through float32: a CPU has instructions to convert from and to it, and converts between two 16-bit formats slowly.
    between = torch.empty(step, dtype=torch.float32) if on_cpu else None
    for first in range(0, stored.num_elements, step):
        part = staging[: min(step, stored.num_elements - first)]
        yield _read_bytes(fd, part.view(torch.uint8), stored.start + first * stored.dtype.itemsize)
        if between is not None and stored.dtype.itemsize == 2:
            part = between[: len(part)].copy_(part)
        elif not on_cpu and stored.dtype != target.dtype:  # converted there: `copy_` would convert it on the host
            part = part.to(target.device)
        flat[first : first + len(part)].copy_(part)


def _read_bytes(fd: int, buffer: Tensor, offset: int) -> int:
    """Fill a flat uint8 tensor from a file."""
    view = buffer.numpy().data
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done : done + CHUNK_BYTES]], offset + done)
        if count == 0:
            raise OSError("the file ends before its last tensor")
        done += count
    return done
