"""Throughput and latency of streamed answers: this server beside other systems, or a running server under load."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.client import Target, asking
from benchmarks.figures import Figure, over_repeats, ratios, summary
from benchmarks.load import ask_once, closed_loop
from benchmarks.process import StartFailed
from benchmarks.systems import OURS, SYSTEMS, Plan, RunningSystem


def compare(model_dir: Path, plan: Plan) -> list[Figure]:
    """Measure the systems one after the other at each number of clients; return figures and ratios.

    Every second repeat goes through them in reverse.
    """
    measured: dict[tuple[str, int], list[Figure]] = {}
    failed: dict[str, Figure] = {}
    with contextlib.ExitStack() as stack:
        systems = {name: RunningSystem(SYSTEMS[name], model_dir, plan) for name in plan.systems}
        for system in systems.values():
            stack.callback(system.close)
        for repeat, clients in itertools.product(range(plan.repeats), plan.clients):
            report.progress.print(f"serve: repeat {repeat + 1} of {plan.repeats}, {clients} clients")
            for name in plan.systems if repeat % 2 == 0 else reversed(plan.systems):
                if name in failed or clients not in systems[name].clients:
                    continue
                try:
                    figure = systems[name].measure(clients)
                except StartFailed as error:
                    report.progress.print(f"serve: {name} failed. {error}", markup=False)
                    failed[name] = {"benchmark": "serve", "system": name, "failed": str(error).split("\n")[0]}
                    continue
                measured.setdefault((name, clients), []).append(figure)
                report.progress.print(f"  {name}: {figure['output_tokens_per_s']:.0f} tokens/s")
    figures = [
        {"benchmark": "serve", "system": name, "clients": clients, **over_repeats(repeats)}
        for (name, clients), repeats in measured.items()
    ]
    figures.sort(key=lambda figure: (plan.systems.index(figure["system"]), figure["clients"]))
    return [*figures, *failed.values(), *_ratios(measured)]


def _ratios(measured: dict[tuple[str, int], list[Figure]]) -> list[Figure]:
    figures: list[Figure] = []
    for (name, clients), theirs in measured.items():
        ours = measured.get((OURS, clients))
        if name == OURS or ours is None or len(ours) != len(theirs):
            continue
        metrics = ["output_tokens_per_s"]
        if "first_token_s_p99" in theirs[0] and not any(figure["unanswered"] for figure in ours):
            metrics.append("first_token_s_p99")
        figures.append(
            {
                "benchmark": "serve",
                "of": OURS,
                "to": name,
                "clients": clients,
                # Where the other system was cut its time to first token is a lower bound, so the ratio is an upper one.
                "bound": any(figure["unanswered"] for figure in theirs),
                "ratio": {key: ratios([f[key] for f in ours], [f[key] for f in theirs]) for key in metrics},
            }
        )
    return figures


async def load_url(target: Target, prompts: Iterator[str], plan: Plan) -> list[Figure]:
    """Load a server that runs somewhere with each number of clients of the plan."""
    await ask_once(target, next(prompts), plan.limit_s)
    figures: list[Figure] = []
    async with asking(target) as ask:
        for clients in plan.clients:
            repeats = []
            for _ in range(plan.repeats):
                run = await closed_loop(
                    ask, prompts, clients=clients, min_seconds=plan.min_seconds, limit_s=plan.limit_s
                )
                repeats.append(summary(run))
            figures.append({"benchmark": "serve", "system": target.url, "clients": clients, **over_repeats(repeats)})
    return figures


def card(figures: Sequence[Figure]) -> None:
    """Print each system's throughput and latency at each number of clients, then the ratios."""
    measured = report.measured
    rows = [[figure["system"], "", "failed", *[""] * 5] for figure in figures if "failed" in figure]
    for figure in (figure for figure in figures if "repeats" in figure):
        bound = ">" if figure["unanswered"] else ""  # cut before the first token: a lower bound
        keys = ("first_token_s_p50", "first_token_s_p99", "gap_s_p50", "gap_s_p99")
        first, first_99, *gaps = (measured(figure.get(key), scale=1000) for key in keys)
        rate, errors = measured(figure["output_tokens_per_s"]), str(figure["errors"] or "")
        rows.append([figure["system"], str(figure["clients"]), rate, bound + first, bound + first_99, *gaps, errors])
    columns = ["", "clients", "tokens/s", "first token ms p50", "p99", "gap ms p50", "p99", "errors"]
    report.table("Serving: medians of the repeats (least-most)", columns, rows)
    report.warn_of_cpu_steal(figures)
    rows = [
        [
            SYSTEMS[figure["to"]].title,
            str(figure["clients"]),
            measured(figure["ratio"]["output_tokens_per_s"], digits=2),
            ("<" if figure["bound"] else "") + measured(figure["ratio"].get("first_token_s_p99"), digits=2),
        ]
        for figure in figures
        if "ratio" in figure
    ]
    if rows:
        columns = ["", "clients", "tokens/s, x", "first token p99, x"]
        report.table("This server beside the others: ratios of neighbouring runs", columns, rows)
