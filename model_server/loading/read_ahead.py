"""Asks the system to read the weights into the page cache while Python still imports: two waits become one."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil

SHARE = 0.5
"""Of the memory that is available: what does not fit would push out what was read before."""


def start(directory: Path) -> threading.Thread:
    """Begin to read a model's weights ahead, in a thread; whatever is wrong with them, loading them will say."""
    thread = threading.Thread(target=_read_ahead, args=(directory,), name="read-ahead", daemon=True)
    thread.start()
    return thread


def _read_ahead(directory: Path) -> None:
    left = int(psutil.virtual_memory().available * SHARE)
    # Mistral's repositories hold the weights a second time as consolidated.safetensors, which nobody reads.
    for file in sorted(directory.glob("model*.safetensors")):
        try:
            with file.open("rb") as stream:
                length = min(left, os.fstat(stream.fileno()).st_size)
                # Length 0 would mean "to the end".
                if length and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(stream.fileno(), 0, length, os.POSIX_FADV_WILLNEED)
        except OSError:
            return
        left -= length
