"""From times to figures: percentiles of a run, medians and spreads over repeats, ratios of contenders."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.load import Run

Figure = dict[str, Any]
"""One line of the results: what was measured, on whom, and the numbers."""

PERCENTILES = (50, 90, 99)


def summary(run: Run) -> Figure:
    """Return one run's numbers: rates, and percentiles of time to first token, gaps and totals.

    An answer cut at the limit stands with the time it had waited by then, which can only be too short:
    `unfinished` says how many there are, and `unanswered` how many of them had not even a first token. Totals and
    times to first token are lower bounds when there are any.
    """
    good = [answer for answer in run.answers if answer.error is None]
    first_s: list[float] = []
    gaps_s: list[float] = []
    totals_s: list[float] = []
    for answer in good:
        first_s.append((answer.chunk_times_s[0] if answer.chunk_times_s else run.ended_s) - answer.asked_s)
        totals_s.append((answer.ended_s or run.ended_s) - answer.asked_s)
        gaps_s.extend(np.diff(answer.chunk_times_s))
    output_tokens = sum(answer.output_tokens for answer in good)
    seconds = run.ended_s - run.began_s
    errors = sorted({answer.error for answer in run.answers if answer.error})
    return {
        "requests": len(run.answers),
        "errors": len(run.answers) - len(good),
        **({"error_examples": errors[:3]} if errors else {}),
        "unfinished": sum(answer.ended_s is None for answer in good),
        "unanswered": sum(not answer.chunk_times_s for answer in good),
        "prompt_tokens": sorted({a.prompt_tokens for a in good if a.prompt_tokens is not None}),
        "output_tokens": output_tokens,
        "seconds": seconds,
        "stolen": run.stolen,
        "output_tokens_per_s": output_tokens / seconds if seconds else 0.0,
        **_percentiles("first_token_s", first_s),
        **_percentiles("gap_s", gaps_s),
        **_percentiles("total_s", totals_s),
    }


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return the median and the extremes of repeats."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def over_repeats(repeats: Sequence[Figure]) -> Figure:
    """Merge the same figure of several repeats: counts are added, measures get median, min and max."""
    merged: Figure = {"repeats": len(repeats)}
    for key in repeats[0]:
        values = [repeat[key] for repeat in repeats if key in repeat]
        if key in ("requests", "errors", "unfinished", "unanswered", "output_tokens"):
            merged[key] = sum(values)
        elif isinstance(values[0], list):
            merged[key] = sorted({item for value in values for item in value})
        elif isinstance(values[0], float):
            merged[key] = spread(values)
        else:
            merged[key] = values[0]
    return merged


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios of repeats taken in turn, each with its neighbour in time.

    A machine that slows down for a minute slows both, so pairs say more than a ratio of medians.
    """
    return spread(a / b for a, b in zip(numerators, denominators, strict=True) if b)


def _percentiles(name: str, values: Sequence[float]) -> Figure:
    if not values:
        return {}
    points = np.percentile(values, PERCENTILES)
    return {f"{name}_p{percent}": float(point) for percent, point in zip(PERCENTILES, points, strict=True)}
