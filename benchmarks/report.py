"""The results: progress on stderr, tables and JSON lines on stdout, and the results file with its machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure

RESULTS_DIR = Path("benchmarks/results")
COLUMNS = (
    "step", "outcome", "test", "value", "answer", "system", "of", "to", "shape", "cache", "prompt_tokens", "clients",
    "batch_size", "context", "read_gb_per_s", "copy_gb_per_s", "tokens_per_s", "of_bandwidth", "of_matmuls",
    "output_tokens_per_s", "without_tokens_per_s", "speedup", "first_token_s", "first_token_s_p50",
    "first_token_s_p99", "gap_s_p50", "gap_s_p99", "errors", "unfinished", "unanswered", "peak_memory_gb", "seconds",
    "failed", "reason",
)  # fmt: skip
"""The names of figures that tables show, in their order."""

progress = Console(stderr=True)


def machine() -> dict[str, Any]:
    """Return the conditions of a measurement: machine, versions, commit, the load before the run."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    # The driver is asked, since importing torch here would take memory from the measured servers.
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "kserve")},
        "commit": _output("git", "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "load_average": round(os.getloadavg()[0], 2),
        **({"gpu": gpus.splitlines()[0]} if gpus else {}),
    }


def _output(*command: str) -> str:
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def announce(machine: dict[str, Any]) -> None:
    """Print the machine, and a warning when other programs keep it busy."""
    progress.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if machine["load_average"] > machine["cores"] / 4:
        progress.print("Other programs keep this machine busy: these figures will not repeat.", style="red")


def write(machine: dict[str, Any], figures: Sequence[Figure], directory: Path) -> Path:
    """Write `<date>-<machine>.json` with one figure a line; return its path."""
    hardware = machine.get("gpu") or f"{machine['cpu']}-{machine['cores']}-cores"
    path = directory / f"{machine['date']}-{re.sub('[^a-z0-9]+', '-', hardware.lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"    {line}" for line in json_lines(figures))
    path.write_text(f'{{\n  "machine": {json.dumps(machine)},\n  "figures": [\n{lines}\n  ]\n}}\n')
    return path


def json_lines(figures: Iterable[Figure]) -> list[str]:
    return [json.dumps(rounded(figure)) for figure in figures]


def rounded(value: Any) -> Any:
    """Return a figure with four significant digits: the measurement has no more."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def tables(figures: Sequence[Figure]) -> str:
    """Return a Markdown table for each benchmark, and one for its ratios; a spread is `median (min-max)`."""
    groups: dict[str, list[Figure]] = {}
    for figure in figures:
        heading = figure["benchmark"] + (", ratios" if "ratio" in figure else "")
        groups.setdefault(heading, []).append({**figure, **figure.get("ratio", {})})
    return "\n".join(f"{heading}\n\n{_table(rows)}" for heading, rows in groups.items())


def _table(rows: Sequence[Figure]) -> str:
    phases = dict.fromkeys(name for row in rows for name in row if name.startswith("phase "))
    names = [name for name in (*COLUMNS, *phases) if any(name in row for row in rows)]
    table = Table(*names, box=MARKDOWN)
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in names))
    console = Console(width=1000, color_system=None, markup=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().strip() + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        median, low, high = (_cell(float(value[name])) for name in ("median", "min", "max"))
        return median if low == high else f"{median} ({low}-{high})"
    return f"{float(f'{value:.3g}'):g}" if isinstance(value, float) else " ".join(str(value).split())[:300]
