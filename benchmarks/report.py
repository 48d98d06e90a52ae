"""What is shown and kept: a card for people, one JSON line for each figure, a results file, and the plot."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import OURS, title
from benchmarks.figures import Figure
from benchmarks.load import MOST_STOLEN

RESULTS_DIR = Path("benchmarks/results")

progress = Console(stderr=True)
"""Where a run says what it is doing; standard output has only the card and the JSON lines."""


def machine() -> dict[str, Any]:
    """Return what a reader needs to judge a figure: machine, versions, commit, the load before the run."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    described = {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "kserve")},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if gpu := _gpu():
        described["gpu"] = gpu
    return described


def announce(described: dict[str, Any]) -> None:
    """Say on what a run is done, and whether something else keeps the machine busy."""
    progress.print(", ".join(f"{name} {value}" for name, value in described.items() if value is not None))
    if described["load_average"] > described["cores"] / 4:
        progress.print("The machine is busy with something else: these figures will not repeat.", style="red")


def results_path(described: dict[str, Any], directory: Path = RESULTS_DIR) -> Path:
    """Return `<date>-<machine>.json`: a later run on the same day and machine replaces the earlier."""
    hardware = described.get("gpu") or f"{described['cpu']}-{described['cores']}-cores"
    return directory / f"{described['date']}-{re.sub('[^a-z0-9]+', '-', hardware.lower()).strip('-')}.json"


def write_results(described: dict[str, Any], figures: Sequence[Figure], path: Path) -> None:
    """Write one JSON object with one figure a line, so that two results compare by eye and by diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("    " + json.dumps(rounded(figure)) for figure in figures)
    path.write_text(f'{{\n  "machine": {json.dumps(described)},\n  "figures": [\n{lines}\n  ]\n}}\n')


def print_json_lines(figures: Iterable[Figure]) -> None:
    for figure in figures:
        print(json.dumps(rounded(figure)), flush=True)


def rounded(value: Any) -> Any:
    """Return a figure with four significant digits: more are not measured."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def table(heading: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are numbers."""
    shown = Table(title=heading, title_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*row)
    # A width that keeps tables whole where there is no terminal to ask.
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(shown)


def measured(spread: dict[str, float] | None, scale: float = 1, digits: int = 0) -> str:
    """Return `median (min-max)` for a person."""
    if spread is None:
        return "-"
    median, low, high = (f"{spread[key] * scale:.{digits}f}" for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}-{high})"


def serve_card(figures: Sequence[Figure]) -> None:
    """Print what each server did at each load, then the ratios."""
    rows = []
    for figure in figures:
        if figure["benchmark"] != "serve" or "ratio" in figure:
            continue
        if "failed" in figure:
            rows.append([figure["contender"], "", "failed", "", "", "", ""])
            continue
        load = f"{figure['clients']}" if "clients" in figure else f"{figure['rate']}/s"
        # A request cut before its first token: the time to that is known only to be longer.
        bound = ">" if figure["unanswered"] else ""
        rows.append(
            [
                figure["contender"],
                load,
                measured(figure["output_tokens_per_s"]),
                bound + measured(figure.get("first_token_s_p50"), scale=1000),
                bound + measured(figure.get("first_token_s_p99"), scale=1000),
                measured(figure.get("gap_s_p50"), scale=1000),
                measured(figure.get("gap_s_p99"), scale=1000),
                str(figure["errors"]) if figure["errors"] else "",
            ]
        )
    columns = ["", "clients", "tokens/s", "first token ms p50", "p99", "gap ms p50", "p99", "errors"]
    table("Serving: medians of the repeats (least-most)", columns, rows)
    most_stolen = max((figure["stolen"]["max"] for figure in figures if "stolen" in figure), default=0.0)
    if most_stolen > MOST_STOLEN:
        progress.print(f"The host took up to {most_stolen:.0%} of the processors' time from these runs.", style="red")
    ratios = [figure for figure in figures if figure["benchmark"] == "serve" and "ratio" in figure]
    if ratios:
        table(
            "This server beside the others: ratios of neighbouring runs",
            ["", "clients", "tokens/s, x", "first token p99, x"],
            [
                [
                    title(figure["to"]),
                    str(figure["clients"]),
                    measured(figure["ratio"]["output_tokens_per_s"], digits=2),
                    ("<" if figure["bound"] else "") + measured(figure["ratio"].get("first_token_s_p99"), digits=2),
                ]
                for figure in ratios
            ],
        )


def plot(figures: Sequence[Figure], path: Path) -> list[Path]:
    """Draw throughput, time to first token and gaps against clients: `path` as .png and .svg, returned."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same figures give the same file
    from matplotlib import pyplot

    panels = (
        ("output_tokens_per_s", "output tokens/s", 1.0),
        ("first_token_s_p50", "time to first token, median (ms)", 1000.0),
        ("gap_s_p50", "gap between tokens, median (ms)", 1000.0),
    )
    shown = [figure for figure in figures if figure["benchmark"] == "serve" and "output_tokens_per_s" in figure]
    shown = [figure for figure in shown if "clients" in figure]
    canvas, axes = pyplot.subplots(1, len(panels), figsize=(15, 4.5), layout="constrained")
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        for contender in dict.fromkeys(figure["contender"] for figure in shown):
            points = [figure for figure in shown if figure["contender"] == contender and key in figure]
            middle = [figure[key]["median"] * scale for figure in points]
            axis.errorbar(
                [figure["clients"] for figure in points],
                middle,
                yerr=[
                    [m - figure[key]["min"] * scale for m, figure in zip(middle, points, strict=True)],
                    [figure[key]["max"] * scale - m for m, figure in zip(middle, points, strict=True)],
                ],
                marker="o",
                capsize=3,
                linewidth=3 if contender == OURS else 1.5,
                label=title(contender),
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("linear" if axis is axes[0] else "log")
        axis.set_xticks(clients := sorted({figure["clients"] for figure in shown}), map(str, clients))
        axis.set_xlabel("clients")
        axis.set_title(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        canvas.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(canvas)
    return files


def _gpu() -> str | None:
    """Return the first card's name, asked of its driver: importing torch here would cost memory and time."""
    if not shutil.which("nvidia-smi"):
        return None
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.splitlines()[0] if asked.returncode == 0 and asked.stdout else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None
