"""Start-up: the time from the process to the first token in the server's own phases, and the peak memory.

`import-baseline` imports torch and Transformers' Mistral and reads the weights once. The phases are those that the
server logs: `start: <phase> <seconds> s (total <seconds> s)`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.checkpoint import checkpoint, prompts_for, weight_files
from benchmarks.comparison import compare
from benchmarks.figures import Figure
from benchmarks.process import START_LIMIT_S, Program
from benchmarks.systems import LLAMA_CPP, OURS, SYSTEMS, TRANSFORMERS_CB, VLLM, installed, serving

BASELINE = "import-baseline"
DTYPES = {"100m": "bfloat16", "2b": "float16"}
"""The stored dtype of each shape: half of the real checkpoints of the larger size are float16."""
_PHASE = re.compile(r"\bstart: (?P<phase>.+?) (?P<seconds>\d+(?:\.\d+)?) s\b")


def measure(*, quick: bool = False) -> list[Figure]:
    """Measure starts with small and large weights, and with weights in the page cache (warm) or not (cold)."""
    if quick:
        return _compare((OURS, BASELINE), "100m", ("warm",), repeats=1)
    return [
        *_compare((OURS, BASELINE), "100m", ("warm", "cold"), repeats=3),
        # Once only for starts of half a minute: the other servers', and those with large weights.
        *_compare(installed((TRANSFORMERS_CB, VLLM, LLAMA_CPP)), "100m", ("warm",), repeats=1),
        *_compare((OURS, BASELINE), "2b", ("cold",), repeats=1),
    ]


def _compare(systems: Sequence[str], shape: str, caches: Sequence[str], repeats: int) -> list[Figure]:
    model_dir = checkpoint(shape, DTYPES[shape])
    points = [{"benchmark": "start", "shape": shape, "cache": cache} for cache in caches]
    return compare(systems, points, repeats, partial(_start, model_dir))


def _start(model_dir: Path, name: str, point: Figure) -> Figure:
    """Start a system; return its times and its peak memory until the first token."""
    files = weight_files(model_dir)
    for file in files:
        file.read_bytes() if point["cache"] == "warm" else drop_from_page_cache(file)
    if name == BASELINE:  # there is no token, so the exit counts as the first
        with Program([sys.executable, "-m", "benchmarks.import_baseline", str(model_dir)]) as program:
            return {"first_token_s": program.wait_for_exit(START_LIMIT_S)}
    [prompt] = prompts_for(model_dir, num_tokens=16, count=1)
    with serving(SYSTEMS[name], model_dir, prompt, max_new_tokens=1) as server:
        return {
            "ready_s": server.ready_s,
            "first_token_s": server.first_token_s,
            **{f"phase {phase}": seconds for phase, seconds in logged_phases(server.program.log()).items()},
            "peak_memory_gb": server.program.peak_memory_bytes() / 1e9,
        }


def logged_phases(log: str) -> dict[str, float]:
    """Return the seconds of each start-up phase in a server's log, in order."""
    return {found["phase"]: float(found["seconds"]) for found in _PHASE.finditer(log)}


def drop_from_page_cache(file: Path) -> None:
    """Make the next read of a file come from the disk."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
