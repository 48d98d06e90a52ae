"""Measures systems in turn, again and again, and compares this server with each of the others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from benchmarks import report
from benchmarks.figures import Figure, over_repeats, ratios
from benchmarks.process import ProgramFailed
from benchmarks.systems import OURS

METRICS = ("output_tokens_per_s", "first_token_s", "first_token_s_p99")
"""The measures that are compared."""


def compare(
    systems: Sequence[str], points: Sequence[Figure], repeats: int, measure: Callable[[str, Figure], Figure]
) -> list[Figure]:
    """Measure the systems one after the other at each point; return figures and ratios.

    Every second repeat goes through the systems in reverse. A system that fails is not measured again.

    Args:
        points: the benchmark's name and the conditions of a measurement, such as the number of clients.
        measure: measures a system at a point; it may raise ProgramFailed.
    """
    measured: dict[tuple[str, int], list[Figure]] = {}
    failed: dict[str, str] = {}
    for repeat, (i, point) in itertools.product(range(repeats), enumerate(points)):
        for system in systems if repeat % 2 == 0 else reversed(systems):
            if system in failed:
                continue
            conditions = ", ".join(f"{name} {value}" for name, value in point.items())
            report.progress.print(f"repeat {repeat + 1} of {repeats}, {conditions}: {system}")
            try:
                measured.setdefault((system, i), []).append(measure(system, point))
            except ProgramFailed as error:
                report.progress.print(f"{system} failed. {error}", markup=False)
                failed[system] = str(error).split("\n")[0]
    figures: list[Figure] = []
    for system, (i, point) in itertools.product(systems, enumerate(points)):
        if theirs := measured.get((system, i)):
            figures.append({"system": system, **point, **over_repeats(theirs)})
            ours = measured.get((OURS, i), [])
            if system != OURS and len(ours) == len(theirs):
                figures.append({"of": OURS, "to": system, **point, "ratio": _ratios(ours, theirs)})
    benchmark = points[0]["benchmark"]
    return figures + [{"benchmark": benchmark, "system": name, "failed": why} for name, why in failed.items()]


def _ratios(ours: Sequence[Figure], theirs: Sequence[Figure]) -> Figure:
    """Return the ratios of neighbouring repeats; none of times to first token that are lower bounds."""
    both = [*ours, *theirs]
    is_bound = any(figure.get("unanswered") for figure in both)
    return {
        metric: ratios([figure[metric] for figure in ours], [figure[metric] for figure in theirs])
        for metric in METRICS
        if all(figure.get(metric) for figure in both) and not (is_bound and metric.startswith("first_token"))
    }
