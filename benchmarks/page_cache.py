"""The page cache, emptied or filled: a start on a node that has, or has not, read the files before."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def empty(files: Iterable[Path]) -> str:
    """Forget what was read; return what was forgotten: everything, or where that is forbidden these files."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "everything"
    except OSError:
        for path in files:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "weights only"


def fill(files: Iterable[Path]) -> None:
    """Read these files, so that the next reader finds them in memory."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            buffer = bytearray(16 << 20)
            while file.readinto(buffer):
                pass
