"""Start-up: the time from the process to the first token in the server's own phases, and the peak memory.

`import-baseline` imports torch and Transformers' Mistral and reads the weights once; ratios are to it. The phases are
those that the server logs: `start: <phase> <seconds> s (total <seconds> s)`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from benchmarks import report
from benchmarks.checkpoint import checkpoint, prompts_for, weight_files
from benchmarks.figures import Figure, over_repeats, ratios
from benchmarks.load import ask_once
from benchmarks.process import START_LIMIT_S, Program, StartFailed, free_port
from benchmarks.systems import LLAMA_CPP, OURS, SYSTEMS, TRANSFORMERS_CB, VLLM, installed

BASELINE = "import-baseline"
DTYPES = {"2b": "float16"}
"""The stored dtype of a shape, if not bfloat16: half of the real checkpoints of this size are float16."""
_PHASE = re.compile(r"\bstart: (?P<phase>.+?) (?P<seconds>\d+(?:\.\d+)?) s\b")


@dataclass(frozen=True)
class Plan:
    shape: str
    caches: Sequence[str]
    systems: Sequence[str]
    repeats: int = 3


QUICK = (Plan("100m", ("warm",), (BASELINE, OURS), repeats=1),)
FULL = (
    Plan("100m", ("warm", "cold"), (BASELINE, OURS)),
    # Once only for starts of half a minute: the other servers', and those with large weights.
    Plan("100m", ("warm",), (TRANSFORMERS_CB, VLLM, LLAMA_CPP), repeats=1),
    Plan("2b", ("cold",), (BASELINE, OURS), repeats=1),
)


def compare(plan: Plan) -> list[Figure]:
    """Start every system in turn; return figures, and ratios to the baseline."""
    return [figure for cache in plan.caches for figure in _compare(plan, cache)]


def _compare(plan: Plan, cache: str) -> list[Figure]:
    model_dir = checkpoint(plan.shape, DTYPES.get(plan.shape, "bfloat16"))
    measured: dict[str, list[Figure]] = {}
    failed: dict[str, str] = {}
    names = installed(plan.systems)
    for repeat in range(plan.repeats):
        for name in names:
            if name in failed:
                continue
            report.progress.print(f"start: {plan.shape}, {cache}: repeat {repeat + 1} of {plan.repeats}: {name}")
            emptied = {"emptied": empty_page_cache(weight_files(model_dir))} if cache == "cold" else {}
            if cache == "warm":
                fill_page_cache(weight_files(model_dir))
            try:
                figure = baseline(model_dir) if name == BASELINE else start(name, model_dir)
            except StartFailed as error:
                report.progress.print(f"start: {name} failed. {error}", markup=False)
                failed[name] = str(error).split("\n")[0]
                continue
            measured.setdefault(name, []).append({**figure, **emptied})
            report.progress.print(f"  first token after {figure['first_token_s']:.2f} s")
    what = {"benchmark": "start", "shape": plan.shape, "cache": cache, "weight_bytes": _weight_bytes(model_dir)}
    figures = [{**what, "system": name, **over_repeats(repeats)} for name, repeats in measured.items()]
    figures += [{**what, "system": name, "failed": reason} for name, reason in failed.items()]
    times = {name: [figure["first_token_s"] for figure in repeats] for name, repeats in measured.items()}
    for name in times.keys() - {BASELINE}:
        if len(times[name]) == len(times.get(BASELINE, [])):
            ratio = {"first_token_s": ratios(times[name], times[BASELINE])}
            figures.append({**what, "of": name, "to": BASELINE, "ratio": ratio})
    return figures


def baseline(model_dir: Path) -> Figure:
    """Return the time of the least work; there is no token, so the exit counts as the first."""
    with Program([sys.executable, "-m", "benchmarks.import_baseline", str(model_dir)]) as program:
        seconds = program.wait_for_exit(START_LIMIT_S)
        phases: dict[str, float] = json.loads(program.log().splitlines()[-1])
    return {"first_token_s": seconds, **{f"phase {phase}": seconds for phase, seconds in phases.items()}}


def start(name: str, model_dir: Path) -> Figure:
    """Start a server; return its times and its peak memory until the first token."""
    system, port = SYSTEMS[name], free_port()
    prompt = prompts_for(model_dir, num_tokens=16, count=1)[0]
    with system.program(model_dir, port) as server:
        ready_s = server.wait_until_ready(port, system.ready_path, START_LIMIT_S)
        answer = uvloop.run(ask_once(system.target(model_dir, port, max_new_tokens=1), prompt, START_LIMIT_S))
        if answer.error or not answer.chunk_times_s:
            raise StartFailed(f"Its first answer failed: {answer.error or 'no answer'}. {server.log_end()}")
        peak_bytes = server.peak_memory_bytes()
        phases = logged_phases(server.log())
    return {
        "ready_s": ready_s,
        "first_token_s": answer.chunk_times_s[0] - server.started_s,
        **{f"phase {phase}": seconds for phase, seconds in phases.items()},
        "peak_memory_bytes": float(peak_bytes),
        "peak_memory_over_weights": peak_bytes / _weight_bytes(model_dir),
    }


def logged_phases(log: str) -> dict[str, float]:
    """Return the seconds of each start-up phase in a server's log, in order."""
    return {found["phase"]: float(found["seconds"]) for found in _PHASE.finditer(log)}


def empty_page_cache(files: Iterable[Path]) -> str:
    """Empty the whole page cache, or where that is not allowed drop these files; return which."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "everything"
    except OSError:
        for path in files:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "weights only"


def fill_page_cache(files: Iterable[Path]) -> None:
    """Read these files, so that the next reader finds them in memory."""
    buffer = bytearray(16 << 20)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _weight_bytes(model_dir: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(model_dir))


def card(figures: Sequence[Figure]) -> None:
    """Print times, phases and memory of each start."""
    starts = [figure for figure in figures if figure["benchmark"] == "start"]
    ratio = {(f["shape"], f["cache"], f["of"]): f["ratio"]["first_token_s"] for f in starts if "ratio" in f}
    rows = []
    for figure in (figure for figure in starts if "ratio" not in figure):
        heading = f"{figure['shape']} ({figure['weight_bytes'] / 1e9:.2g} GB), {figure['cache']}"
        name = figure["system"]
        if "failed" in figure:
            rows.append([heading, name, "did not start", "", "", ""])
            continue
        phases = [f"{key[6:]} {value['median']:.2f}" for key, value in figure.items() if key.startswith("phase ")]
        seconds = report.measured(figure["first_token_s"], digits=2)
        over = report.measured(ratio.get((figure["shape"], figure["cache"], name)), digits=2)
        peak = report.measured(figure.get("peak_memory_bytes"), scale=1e-6)
        rows.append([heading, name, seconds, over, ", ".join(phases), peak])
    columns = ["weights, page cache", "", "first token s", "x baseline", "phases, s", "peak MB"]
    report.table("Starts: medians of the repeats (least-most)", columns, rows)
