"""The benchmarks: `python -m benchmarks` runs all parts in about 12 minutes on two cores, `--quick` in two.

    python -m benchmarks serve --systems ours,transformers-cb --clients 1,8,32
    python -m benchmarks start roofline
    python -m benchmarks serve --url http://HOST/v1/models/mistral-7b:predict --tokenizer DIR
    python -m benchmarks serve --url http://HOST/openai/v1/completions --model mistral-7b --tokenizer DIR

Results and plot are written after each part, so an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import uvloop

from benchmarks import report, serve, start
from benchmarks.checkpoint import checkpoint, prompts_for
from benchmarks.client import Target
from benchmarks.figures import Figure
from benchmarks.process import stop_children_on_sigterm
from benchmarks.systems import ONE_AT_A_TIME, OURS, SYSTEMS, TRANSFORMERS_CB, Plan, installed


def measure_serving(options: argparse.Namespace) -> list[Figure]:
    model_dir = options.tokenizer or checkpoint("100m", "bfloat16")
    plan = Plan(options.systems, options.clients, options.repeats, options.prompt_tokens, options.max_new_tokens)
    if options.quick:
        plan = replace(plan, systems=(OURS, TRANSFORMERS_CB, ONE_AT_A_TIME), repeats=1, min_seconds=2)
    if options.url:
        headers = dict(header.split(": ", 1) for header in options.header)
        try:
            target = Target(options.url, plan.max_new_tokens, options.model, options.extra, headers)
            prompts = itertools.cycle(prompts_for(model_dir, plan.prompt_tokens, count=1024))
        except ValueError as error:
            raise SystemExit(str(error)) from None
        figures = uvloop.run(serve.load_url(target, prompts, replace(plan, limit_s=options.limit_seconds)))
    else:
        figures = serve.compare(model_dir, replace(plan, systems=installed(plan.systems)))
    serve.card(figures)
    return figures


def measure_starts(options: argparse.Namespace) -> list[Figure]:
    figures = [figure for plan in (start.QUICK if options.quick else start.FULL) for figure in start.compare(plan)]
    start.card(figures)
    return figures


def measure_roofline(options: argparse.Namespace) -> list[Figure]:
    # Imported here: torch's threads and memory would disturb the servers that are measured before.
    from benchmarks import roofline

    figures = roofline.measure(roofline.default_plan(quick=options.quick))
    roofline.card(figures)
    return figures


PARTS: dict[str, Callable[[argparse.Namespace], list[Figure]]] = {
    "serve": measure_serving,
    "start": measure_starts,
    "roofline": measure_roofline,
}


def main() -> None:
    options = _parser().parse_args()
    stop_children_on_sigterm()
    began_s = time.monotonic()
    report.announce(machine := report.machine())
    whole = not (options.parts or options.quick or options.url)
    out = options.out or (report.RESULTS_DIR if whole else None)
    figures: list[Figure] = []
    for part in ["serve"] if options.url else options.parts or PARTS:
        figures += PARTS[part](options)
        if out:
            report.write(machine, figures, out)
    report.print_json_lines(figures)
    report.progress.print(f"{(time.monotonic() - began_s) / 60:.1f} minutes")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan, add = Plan(), parser.add_argument
    add("parts", nargs="*", type=_one_of(PARTS), metavar="PART", help=f"of {' '.join(PARTS)}; default: all")
    add("--quick", action="store_true", help="fewer systems and one repeat: not a result")
    add("--out", type=Path, help=f"directory for results; default of a whole run: {report.RESULTS_DIR}")
    add("--systems", type=lambda text: [*map(_one_of(SYSTEMS), text.split(","))], default=plan.systems,
        help=f"of {','.join(SYSTEMS)}")  # fmt: skip
    add(
        "--clients",
        type=lambda text: [*map(int, text.split(","))],
        default=plan.clients,
        help="concurrent streams: 1,8",
    )
    add("--repeats", type=int, default=plan.repeats)
    add("--prompt-tokens", type=int, default=plan.prompt_tokens)
    add("--max-new-tokens", type=int, default=plan.max_new_tokens)
    add("--url", help="load this V1 or OpenAI URL instead of starting systems")
    add("--model", default="", help="with an OpenAI --url: the model's name")
    add("--header", action="append", default=[], help="with --url: 'Authorization: Api-Key ...'")
    add("--extra", type=json.loads, default={}, help="with --url: more body fields, as JSON ('min_new_tokens')")
    add("--tokenizer", type=Path, help="with --url: the directory of the served model's tokenizer.json")
    add("--limit-seconds", type=float, default=300, help="with --url: a load is cut after this time")
    return parser


def _one_of(known: Collection[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return text

    return parse


if __name__ == "__main__":
    main()
