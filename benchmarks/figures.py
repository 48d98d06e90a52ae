"""Computes figures from times: percentiles of a run, medians and spreads over repeats, ratios between systems."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.load import Run

Figure = dict[str, Any]
"""One line of the results: what was measured, on which system, and the numbers."""
COUNTS = ("requests", "errors", "unfinished", "unanswered", "output_tokens")


def summary(run: Run) -> Figure:
    """Return a run's rate, and percentiles of time to first token, gaps between tokens and total time.

    An unfinished answer counts with the time it had waited, so totals and times to first token are lower bounds when
    `unfinished` or `unanswered` (no first token) is above 0.
    """
    good = [answer for answer in run.answers if answer.error is None]
    output_tokens, seconds = sum(a.output_tokens for a in good), run.ended_s - run.began_s
    times: dict[str, list[float]] = {
        "first_token_s": [(a.chunk_times_s[0] if a.chunk_times_s else run.ended_s) - a.asked_s for a in good],
        "gap_s": [float(gap_s) for a in good for gap_s in np.diff(a.chunk_times_s)],
        "total_s": [(a.ended_s or run.ended_s) - a.asked_s for a in good],
    }
    return {
        "requests": len(run.answers),
        "errors": len(run.answers) - len(good),
        "error_examples": sorted({a.error for a in run.answers if a.error})[:3],
        "unfinished": sum(a.ended_s is None for a in good),
        "unanswered": sum(not a.chunk_times_s for a in good),
        "output_tokens": output_tokens,
        "seconds": seconds,
        "cpu_steal": run.cpu_steal,
        "output_tokens_per_s": output_tokens / seconds if seconds else 0.0,
        **{
            f"{name}_p{percent}": float(np.percentile(values, percent))
            for name, values in times.items()
            for percent in (50, 90, 99)
            if values
        },
    }


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def over_repeats(repeats: Sequence[Figure]) -> Figure:
    """Merge the figures of several repeats: counts are added, measures become median, min and max."""
    merged: Figure = {"repeats": len(repeats)}
    for key, first in repeats[0].items():
        values = [repeat[key] for repeat in repeats if key in repeat]
        if key in COUNTS:
            merged[key] = sum(values)
        elif isinstance(first, list):
            merged[key] = sorted({item for value in values for item in value})
        else:
            merged[key] = spread(values)
    return merged


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios of neighbouring repeats: a machine that slows down slows both of a pair."""
    return spread(a / b for a, b in zip(numerators, denominators, strict=True) if b)
