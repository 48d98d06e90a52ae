"""glibc's allocator: all threads use one arena, and free memory returns to the system."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="the C library is not glibc")

ALLOCATES = """
import ctypes, os, threading
from model_server.compute.cpu import malloc
malloc.use_one_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.fdopen.restype, libc.malloc_info.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
libc.fflush.argtypes = [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def allocate():
    pieces = [libc.malloc(60_000) for _ in range(1000)]  # each too small for a mapping of its own
    for piece in pieces:
        ctypes.memset(piece, 1, 60_000)
    for piece in pieces[:-1]:  # the last one holds the end of the heap
        libc.free(piece)

before = resident()
for thread in [threading.Thread(target=allocate) for _ in range(3)]:
    thread.start()
    thread.join()
grown = resident() - before
malloc.trim()
print(grown, resident() - before, flush=True)
out = libc.fdopen(1, b"w")
libc.malloc_info(0, out)
libc.fflush(out)
"""


@glibc
@pytest.mark.parametrize(
    ("environ", "num_arenas"), [({}, range(1, 2)), ({"MALLOC_ARENA_MAX": "4"}, range(2, 5))], ids=str
)
def test_threads_share_an_arena_unless_configured_otherwise_and_trim_returns_free_memory(
    environ: dict[str, str], num_arenas: range
) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"} | environ
    out = subprocess.run(
        [sys.executable, "-c", ALLOCATES], env=environ, capture_output=True, text=True, check=True
    ).stdout

    grown, left = map(int, out.splitlines()[0].split())
    assert grown > 50e6
    assert left < 5e6
    assert len(re.findall("<heap nr", out)) in num_arenas
