"""How long a start takes, from the process to the first token, in the server's own phases, and what it holds.

    python -m benchmarks.start                              100M and 2B parameters, page cache warm and cold
    python -m benchmarks.start --shapes 100m --caches warm --repeats 5

The floor beside it imports torch and Transformers' Mistral and reads the weights once (`floor`). The server's
phases are those it logs: `start: <phase> <seconds> s (total <seconds> s)`. Seen from outside, `ready` is the
first 200 of the readiness route and `first token` the first text of a stream asked for at that moment.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import page_cache, report
from benchmarks.contenders import OURS, SERVERS, TRANSFORMERS_CB, title
from benchmarks.figures import Figure, over_repeats, ratios
from benchmarks.models import SHAPES, checkpoint, weight_bytes, weight_files
from benchmarks.process import START_LIMIT_S, Program, StartFailed, free_port, stop_children_on_sigterm
from benchmarks.prompts import prompts_for
from benchmarks.streams import ask_once

FLOORS: dict[str, list[str]] = {"floor": [], "floor-held": ["--held"]}
FLOOR = "floor"
"""What ratios are to."""

_PHASE = re.compile(r"\bstart: (?P<phase>.+?) (?P<seconds>\d+(?:\.\d+)?) s\b")


@dataclass(frozen=True)
class Plan:
    shapes: Sequence[str] = ("100m", "2b")
    caches: Sequence[str] = ("warm", "cold")
    contenders: Sequence[str] = (*FLOORS, OURS, TRANSFORMERS_CB)
    repeats: int = 3


QUICK = Plan(shapes=("100m",), caches=("warm",), contenders=(FLOOR, OURS), repeats=1)

DTYPES = {"2b": "float16"}
"""What a shape is stored in, if not bfloat16: half of the real checkpoints of this size are float16."""


def compare(plan: Plan, model_dir: Callable[[str], Path] | None = None) -> list[Figure]:
    """Start every contender in turn, as often as the plan repeats; return figures and ratios to the floor."""
    figures: list[Figure] = []
    for shape in plan.shapes:
        directory = model_dir(shape) if model_dir else checkpoint(shape, DTYPES.get(shape, "bfloat16"))
        for cache in plan.caches:
            figures += _compare_on(directory, shape, cache, plan)
    return figures


def _compare_on(model_dir: Path, shape: str, cache: str, plan: Plan) -> list[Figure]:
    measured: dict[str, list[Figure]] = {name: [] for name in plan.contenders}
    failed: dict[str, str] = {}
    for repeat in range(plan.repeats):
        for name in plan.contenders:
            if name in failed:
                continue
            report.progress.print(f"start: {shape}, {cache}: repeat {repeat + 1} of {plan.repeats}: {name}")
            emptied = {}
            if cache == "cold":
                emptied = {"emptied": page_cache.empty(weight_files(model_dir))}
            else:
                page_cache.fill(weight_files(model_dir))
            try:
                figure = floor(name, model_dir) if name in FLOORS else start(name, model_dir)
            except StartFailed as error:
                report.progress.print(f"start: {name} failed. {error}", markup=False)
                failed[name] = str(error).split("\n")[0]
                continue
            measured[name].append({**figure, **emptied})
            report.progress.print(f"  first token after {figure['first_token_s']:.2f} s")
    what = {"benchmark": "start", "shape": shape, "cache": cache, "weight_bytes": weight_bytes(model_dir)}
    figures = [{**what, "contender": name, **over_repeats(repeats)} for name, repeats in measured.items() if repeats]
    figures += [{**what, "contender": name, "failed": reason} for name, reason in failed.items()]
    floors = [figure["first_token_s"] for figure in measured.get(FLOOR, [])]
    for name, repeats in measured.items():
        if name not in FLOORS and floors and len(repeats) == len(floors):
            times = [figure["first_token_s"] for figure in repeats]
            figures.append({**what, "of": name, "to": FLOOR, "ratio": {"first_token_s": ratios(times, floors)}})
    return figures


def floor(name: str, model_dir: Path) -> Figure:
    """Return the time of the least work; there is no token, so its end stands for the first."""
    with Program([sys.executable, "-m", "benchmarks.floor", *FLOORS[name], str(model_dir)]) as program:
        ended_s = program.wait_for_exit(START_LIMIT_S)
        phases: dict[str, float] = json.loads(program.log().splitlines()[-1])
    return {"first_token_s": ended_s, **{f"phase {name}": seconds for name, seconds in phases.items()}}


def start(name: str, model_dir: Path) -> Figure:
    """Start a server and return the times and the memory of its way to the first token."""
    contender, port = SERVERS[name], free_port()
    target = contender.target(model_dir, port, max_new_tokens=1)
    prompt = prompts_for(model_dir, num_tokens=16, count=1)[0]
    with Program(contender.command_for(model_dir, port)) as server:
        ready_s = server.wait_until_ready(port, contender.ready_path, START_LIMIT_S)
        answer = uvloop.run(ask_once(target, prompt, START_LIMIT_S))
        if answer.error or not answer.chunk_times_s:
            raise StartFailed(f"Its first answer failed: {answer.error or 'no answer'}. {server.log_end()}")
        memory = server.memory_bytes()
        phases = logged_phases(server.log())
    return {
        "ready_s": ready_s,
        "first_token_s": answer.chunk_times_s[0] - server.started_s,
        **{f"phase {phase}": seconds for phase, seconds in phases.items()},
        "peak_memory_bytes": float(memory["peak"]),
        "peak_memory_over_weights": memory["peak"] / weight_bytes(model_dir),
    }


def logged_phases(log: str) -> dict[str, float]:
    """Return the seconds of each phase that a server's log tells, in its order."""
    return {found["phase"]: float(found["seconds"]) for found in _PHASE.finditer(log)}


def card(figures: Sequence[Figure]) -> None:
    """Print times, phases and memory of each start."""
    starts = [figure for figure in figures if figure["benchmark"] == "start"]
    ratio = {(f["shape"], f["cache"], f["of"]): f["ratio"]["first_token_s"] for f in starts if "ratio" in f}
    rows = []
    for figure in starts:
        if "ratio" in figure:
            continue
        case = (figure["shape"], figure["cache"], figure["contender"])
        heading = f"{figure['shape']} ({figure['weight_bytes'] / 1e9:.2g} GB), {figure['cache']}"
        name = figure["contender"] if figure["contender"] in FLOORS else title(figure["contender"])
        if "failed" in figure:
            rows.append([heading, name, "did not start", "", "", ""])
            continue
        phases = ", ".join(
            f"{key.removeprefix('phase ')} {value['median']:.2f}"
            for key, value in figure.items()
            if key.startswith("phase ")
        )
        peak = figure.get("peak_memory_bytes")
        rows.append(
            [
                heading,
                name,
                report.measured(figure["first_token_s"], digits=2),
                report.measured(ratio.get(case), digits=2),
                phases,
                report.measured(peak, scale=1e-6) if peak else "",
            ]
        )
    columns = ["weights, page cache", "", "first token s", "x floor", "phases, s", "peak MB"]
    report.table("Starts: medians of the repeats (least-most)", columns, rows)


def main() -> None:
    options = _parser().parse_args()
    stop_children_on_sigterm()
    report.announce(described := report.machine())
    plan = Plan(options.shapes, options.caches, options.contenders, options.repeats)
    figures = compare(plan, (lambda _: options.model_dir) if options.model_dir else None)
    card(figures)
    report.print_json_lines(figures)
    if options.out:
        report.write_results(described, figures, report.results_path(described, options.out))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan = Plan()
    add: Any = parser.add_argument
    add("--shapes", type=_some(SHAPES), default=plan.shapes, help=f"of {','.join(SHAPES)}")
    add("--caches", type=_some(("warm", "cold")), default=plan.caches, help="of warm,cold")
    add("--contenders", type=_some((*FLOORS, *SERVERS)), default=plan.contenders)
    add("--repeats", type=int, default=plan.repeats)
    add("--model-dir", type=Path, help="weights to start with, whatever the shape is called")
    add("--out", type=Path, help="directory for the results")
    return parser


def _some(names: Any) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        given = tuple(text.split(","))
        if unknown := set(given) - set(names):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(names)}")
        return given

    return parse


if __name__ == "__main__":
    main()
