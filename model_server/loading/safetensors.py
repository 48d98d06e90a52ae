"""Weights from safetensors files to where they will be computed with, each byte once.

Tensors are read into memory that is theirs for good, so the peak is the weights themselves. (Mapping the files costs
nothing until a weight is converted or laid out anew; from then on it is held twice.) Owns the format's header
(https://github.com/huggingface/safetensors#format) and the reading; what the tensors are for is `weights.py`'s.
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
"""Read at once."""
CONVERTED_BYTES = 2**20
"""Read at once where a tensor is converted: small enough to stay in the processor's cache until it has been."""
THREADS = 4
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Of its first byte in the file."""

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Return the float tensors of some safetensors files by name.

    Raises:
        SafetensorError, OSError: a file is not what its header says.
    """
    found = {}
    for file in files:
        with safe_open(file, framework="pt"):
            pass  # the library's own checks: header, offsets, length of the file
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = orjson.loads(stream.read(header_bytes))
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in DTYPES:
                start = 8 + header_bytes + entry["data_offsets"][0]
                found[name] = StoredTensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return found


def read_all(wanted: Mapping[str, tuple[StoredTensor, Tensor]], on_bytes: Callable[[int], None]) -> None:
    """Fill each target from its stored tensor, several at a time; `on_bytes` is told how many bytes have come.

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

    # In the order of the files, so that the disk is read forwards.
    jobs = sorted(wanted.values(), key=lambda job: (job[0].file, job[0].start))
    with ThreadPoolExecutor(THREADS, thread_name_prefix="read-weights") as pool:
        list(pool.map(read, jobs))


def _read_one(fd: int, stored: StoredTensor, target: Tensor) -> Iterator[int]:
    """Fill one target; yield the bytes of each part."""
    if target.device.type == "cpu" and target.dtype == stored.dtype:
        yield _read_bytes(fd, target.view(-1).view(torch.uint8), stored.start)
        return
    flat = target.view(-1)
    on_cpu = target.device.type == "cpu"
    step = (CONVERTED_BYTES if on_cpu else CHUNK_BYTES) // stored.dtype.itemsize
    staging = torch.empty(step, dtype=stored.dtype, pin_memory=not on_cpu)
    # By way of float32: a CPU converts to and from it with instructions of its own, between two small formats slowly.
    between = torch.empty(step, dtype=torch.float32) if on_cpu else None
    for first in range(0, stored.num_elements, step):
        part = staging[: min(step, stored.num_elements - first)]
        yield _read_bytes(fd, part.view(torch.uint8), stored.start + first * stored.dtype.itemsize)
        if between is not None and stored.dtype.itemsize == 2:
            part = between[: len(part)].copy_(part)
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
