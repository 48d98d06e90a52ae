"""Prints and saves the results: tables, one JSON line for each figure, a results file and the plot."""

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

from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure
from benchmarks.load import MAX_CPU_STEAL
from benchmarks.systems import OURS, SYSTEMS

RESULTS_DIR = Path("benchmarks/results")

progress = Console(stderr=True)
"""Progress goes to stderr; stdout has only the tables and the JSON lines."""


def machine() -> dict[str, Any]:
    """Return the conditions of a measurement: machine, versions, commit, the load before the run."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    described = {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "kserve")},
        "commit": _output("git", "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "load_average": round(os.getloadavg()[0], 2),
    }
    # The driver is asked, since importing torch here would take memory from the measured servers.
    if gpus := _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"):
        described["gpu"] = gpus.splitlines()[0]
    return described


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
    """Write `<date>-<machine>.json` with one figure a line, and the plot when there are serving figures."""
    hardware = machine.get("gpu") or f"{machine['cpu']}-{machine['cores']}-cores"
    path = directory / f"{machine['date']}-{re.sub('[^a-z0-9]+', '-', hardware.lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("    " + json.dumps(rounded(figure)) for figure in figures)
    path.write_text(f'{{\n  "machine": {json.dumps(machine)},\n  "figures": [\n{lines}\n  ]\n}}\n')
    if any("output_tokens_per_s" in figure for figure in figures):
        plot(figures, path)
    return path


def print_json_lines(figures: Iterable[Figure]) -> None:
    for figure in figures:
        print(json.dumps(rounded(figure)), flush=True)


def rounded(value: Any) -> Any:
    """Return a figure with four significant digits: the measurement has no more."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def table(heading: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are numbers."""
    shown = Table(title=heading, title_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(shown)


def measured(spread: dict[str, float] | None, scale: float = 1, digits: int = 0) -> str:
    """Return `median (min-max)`."""
    if spread is None:
        return "-"
    median, low, high = (f"{spread[key] * scale:.{digits}f}" for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}-{high})"


def warn_of_cpu_steal(figures: Iterable[Figure]) -> None:
    steal = max((figure["cpu_steal"]["max"] for figure in figures if "cpu_steal" in figure), default=0.0)
    if steal > MAX_CPU_STEAL:
        progress.print(f"The host took up to {steal:.0%} of the CPU time from these runs.", style="red")


def plot(figures: Sequence[Figure], path: Path) -> list[Path]:
    """Draw throughput, time to first token and gaps against clients; return the .png and the .svg."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same figures give the same file
    from matplotlib import pyplot

    panels = (
        ("output_tokens_per_s", "output tokens/s", 1.0),
        ("first_token_s_p50", "time to first token, median (ms)", 1000.0),
        ("gap_s_p50", "gap between tokens, median (ms)", 1000.0),
    )
    shown = [figure for figure in figures if "output_tokens_per_s" in figure]
    canvas, axes = pyplot.subplots(1, len(panels), figsize=(15, 4.5), layout="constrained")
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        for system in dict.fromkeys(figure["system"] for figure in shown):
            points = [figure for figure in shown if figure["system"] == system and key in figure]
            spreads = [{name: value * scale for name, value in figure[key].items()} for figure in points]
            axis.errorbar(
                [figure["clients"] for figure in points],
                [s["median"] for s in spreads],
                yerr=[[s["median"] - s["min"] for s in spreads], [s["max"] - s["median"] for s in spreads]],
                marker="o",
                capsize=3,
                linewidth=3 if system == OURS else 1.5,
                label=SYSTEMS[system].title if system in SYSTEMS else system,
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("linear" if axis is axes[0] else "symlog")  # a gap may be 0
        axis.set_xticks(clients := sorted({figure["clients"] for figure in shown}), map(str, clients))
        axis.set_xlabel("clients")
        axis.set_title(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in files:
        canvas.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(canvas)
    return files
