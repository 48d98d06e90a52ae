"""glibc's allocator, told to give memory back. Elsewhere (musl, macOS) nothing happens.

See malloc_trim(3) and mallopt(3).
"""

from __future__ import annotations

import ctypes
import os

_M_ARENA_MAX = -8
_libc = ctypes.CDLL(None)


def use_one_arena() -> None:
    """Have all threads allocate from one arena; call before there are threads.

    glibc makes an arena for each of the first threads and cannot trim the end of any but the first: tens of megabytes
    that a step of many tokens or a `generate` call once needed would stay. What the operator has set stays.
    """
    if "MALLOC_ARENA_MAX" not in os.environ and hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Hand all memory back to the system that is free."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
