"""Limits glibc's allocator to one arena and returns free memory to the system. Does nothing with other C libraries.

See malloc_trim(3) and mallopt(3).
"""

from __future__ import annotations

import ctypes
import os

_M_ARENA_MAX = -8
_libc = ctypes.CDLL(None)


def use_one_arena() -> None:
    """Make all threads allocate from one arena; call it before threads start. `MALLOC_ARENA_MAX` overrides it.

    By default, glibc creates an arena for each of the first threads, and `malloc_trim` shortens only the main arena.
    The memory of one large step or `generate` call, tens of megabytes, would stay resident.
    """
    if "MALLOC_ARENA_MAX" not in os.environ and hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Return all free memory to the system."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
