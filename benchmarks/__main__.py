"""All benchmarks in one run: `python -m benchmarks` in about 12 minutes on two cores, `--quick` in two.

Writes `benchmarks/results/<date>-<machine>.json` with the plot beside it, and keeps what it has when interrupted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import http_cost, report, serve, start
from benchmarks.contenders import OURS, TRANSFORMERS_CB
from benchmarks.figures import Figure
from benchmarks.models import checkpoint
from benchmarks.process import stop_children_on_sigterm


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer contenders, one repeat: a look, not a result")
    parser.add_argument("--out", type=Path, help=f"directory for results; default {report.RESULTS_DIR}, quick: none")
    options = parser.parse_args()
    stop_children_on_sigterm()
    began_s = time.monotonic()
    report.announce(described := report.machine())
    out = options.out or (None if options.quick else report.RESULTS_DIR)

    def measure_limits() -> list[Figure]:
        # Imported only now: torch's threads and memory have no place beside the servers that are measured.
        from benchmarks import limits

        figures = limits.measure(limits.default_plan(quick=options.quick))
        limits.card(figures)
        return figures

    def measure_serving() -> list[Figure]:
        plan = serve.QUICK if options.quick else serve.Plan()
        figures = serve.compare(checkpoint("100m", "bfloat16"), plan)
        report.serve_card(figures)
        return figures

    def measure_http() -> list[Figure]:
        figures = [] if options.quick else http_cost.compare(checkpoint("100m", "bfloat16"))
        if figures:
            http_cost.card(figures)
        return figures

    def measure_starts() -> list[Figure]:
        if options.quick:
            figures = start.compare(start.QUICK)
        else:
            # Once only what takes half a minute a time: the other server's start, and large weights.
            contenders = (*start.FLOORS, OURS)
            figures = start.compare(start.Plan(shapes=("100m",), contenders=contenders))
            figures += start.compare(start.Plan(("100m",), ("warm",), (TRANSFORMERS_CB,), repeats=1))
            figures += start.compare(start.Plan(("2b",), ("cold",), contenders, repeats=1))
        start.card(figures)
        return figures

    parts: tuple[Callable[[], list[Figure]], ...] = (measure_serving, measure_http, measure_starts, measure_limits)
    figures: list[Figure] = []
    for part in parts:
        figures += part()
        if out:
            path = report.results_path(described, out)
            report.write_results(described, figures, path)
            report.plot(figures, path)
    report.print_json_lines(figures)
    report.progress.print(f"{(time.monotonic() - began_s) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
