"""The benchmarks: `python -m benchmarks` runs all parts in about 12 minutes on two cores, `--quick` in two.

    python -m benchmarks serve --systems ours,transformers-cb --clients 1,8,32
    python -m benchmarks start roofline
    python -m benchmarks serve --url http://HOST/v1/models/mistral-7b:predict --tokenizer DIR
    python -m benchmarks serve --url http://HOST/openai/v1/completions --model mistral-7b --tokenizer DIR

Results are written after each part, so an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import signal
from dataclasses import replace
from pathlib import Path

from benchmarks import report, serve, start
from benchmarks.checkpoint import SHAPES, checkpoint
from benchmarks.client import Target
from benchmarks.figures import Figure
from benchmarks.systems import ONE_AT_A_TIME, OURS, SYSTEMS, TRANSFORMERS_CB, installed

PARTS = ("serve", "start", "roofline")


def measure(part: str, options: argparse.Namespace) -> list[Figure]:
    if part == "serve":
        return measure_serving(options)
    if part == "start":
        return start.measure(quick=options.quick)
    # Imported here: torch's threads and memory would disturb the servers that are measured before.
    from benchmarks import roofline

    return roofline.measure(options.shape)


def measure_serving(options: argparse.Namespace) -> list[Figure]:
    names = ("systems", "clients", "repeats", "prompt_tokens", "max_new_tokens")
    plan = serve.Plan(**{name: getattr(options, name) for name in names})
    if options.quick:
        plan = replace(plan, systems=(OURS, TRANSFORMERS_CB, ONE_AT_A_TIME), repeats=1, min_seconds=2)
    if options.url:
        headers = dict(header.split(": ", 1) for header in options.header)
        try:
            target = Target(options.url, plan.max_new_tokens, options.model, options.extra, headers)
            return serve.load_server(target, options.tokenizer, replace(plan, limit_s=options.limit_seconds or 300))
        except ValueError as error:
            raise SystemExit(str(error)) from None
    plan = replace(plan, systems=installed(plan.systems), limit_s=options.limit_seconds or plan.limit_s)
    model_dir = checkpoint(options.shape or "100m", "float16" if options.shape == "7b" else "bfloat16")
    return serve.compare_systems(model_dir, plan)


def main() -> None:
    options = _options()
    report.announce(machine := report.machine())
    whole = not (options.parts or options.quick or options.url)
    out = options.out or (report.RESULTS_DIR if whole else None)
    figures: list[Figure] = []
    for part in ["serve"] if options.url else options.parts or PARTS:
        figures += (measured := measure(part, options))
        print(report.tables(measured))
        if out:
            report.write(machine, figures, out)
    print(*report.json_lines(figures), sep="\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan, add = serve.Plan(), parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {' '.join(PARTS)}; default: all")
    add("--quick", action="store_true", help="fewer systems and one repeat: not a result")
    add("--out", type=Path, help=f"directory for results; default of a whole run: {report.RESULTS_DIR}")
    add("--systems", type=lambda text: text.split(","), default=plan.systems, help=f"of {','.join(SYSTEMS)}")
    add("--shape", choices=SHAPES, help="the model of serve and roofline; default: 100m, and 7b for a GPU's roofline")
    add("--clients", type=_integers, default=plan.clients, help="concurrent streams: 1,8")
    add("--repeats", type=int, default=plan.repeats)
    add("--prompt-tokens", type=_integers, default=plan.prompt_tokens, help="lengths of prompts: 128,1024")
    add("--max-new-tokens", type=int, default=plan.max_new_tokens)
    add("--limit-seconds", type=float, help="a load is cut after this time; default: 10, with --url 300")
    add("--url", help="load this V1 or OpenAI URL instead of starting systems; needs --tokenizer")
    add("--model", default="", help="with an OpenAI --url: the model's name")
    add("--header", action="append", default=[], help="with --url: 'Authorization: Api-Key ...'")
    add("--extra", type=json.loads, default={}, help="with --url: more body fields, as JSON ('min_new_tokens')")
    add("--tokenizer", type=Path, help="with --url: the directory of the served model's tokenizer.json")
    options = parser.parse_args()
    for name, known in [*((part, PARTS) for part in options.parts), *((s, SYSTEMS) for s in options.systems)]:
        if name not in known:
            parser.error(f"{name!r} is not one of {', '.join(known)}.")
    if options.url and not options.tokenizer:
        parser.error("--url needs --tokenizer.")
    return options


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwinds as Ctrl-C does, which stops the systems
    main()
