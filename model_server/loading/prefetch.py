"""Reads the weights into the page cache while Python still imports torch. Imports neither torch nor the loader."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil

MAX_SHARE = 0.5
"""Share of the available memory to fill: more would evict what was read first."""


def prefetch_weights(directory: Path) -> threading.Thread:
    """Ask the kernel, in a thread, to read a model's weights; errors are left to the loader, which explains them."""
    thread = threading.Thread(target=_prefetch, args=(directory,), name="prefetch", daemon=True)
    thread.start()
    return thread


def _prefetch(directory: Path) -> None:
    remaining_bytes = int(psutil.virtual_memory().available * MAX_SHARE)
    # Not consolidated.safetensors, where Mistral's repositories hold the same weights again.
    for file in sorted(directory.glob("model*.safetensors")):
        try:
            with file.open("rb") as stream:
                num_bytes = min(remaining_bytes, os.fstat(stream.fileno()).st_size)
                # Length 0 would mean "to the end of the file".
                if num_bytes and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(stream.fileno(), 0, num_bytes, os.POSIX_FADV_WILLNEED)
        except OSError:
            return
        remaining_bytes -= num_bytes
