"""Throughput and latency of streamed answers: ours beside the others on this machine, or any URL under load.

python -m benchmarks.serve                         every contender in turn, three times
python -m benchmarks.serve --clients 1,2,4,8,16,32 --contenders ours
python -m benchmarks.serve --url http://HOST/v1/models/mistral-7b:predict --clients 1,8,32
python -m benchmarks.serve --url http://HOST/openai/v1/completions --model mistral-7b --rate 2 --requests 100
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import uvloop

from benchmarks import report
from benchmarks.contenders import ALL, BARE, OURS, TRANSFORMERS_CB
from benchmarks.entrants import Plan, entrant
from benchmarks.figures import Figure, over_repeats, ratios, summary
from benchmarks.load import closed_loop, open_loop
from benchmarks.models import SHAPES, checkpoint
from benchmarks.process import StartFailed, stop_children_on_sigterm
from benchmarks.prompts import plain_prompts, prompts_for
from benchmarks.streams import ask_once, asking
from benchmarks.wire import Target

QUICK = Plan(contenders=(OURS, BARE, TRANSFORMERS_CB), repeats=1, min_seconds=2)


def compare(model_dir: Path, plan: Plan) -> list[Figure]:
    """Measure the contenders, one beside the other at each number of clients, and return figures and ratios.

    Every second repeat goes round them the other way.
    """
    measured: dict[tuple[str, int], list[Figure]] = {}
    failed: dict[str, Figure] = {}
    with contextlib.ExitStack() as running:
        entrants = {name: entrant(name, model_dir, plan) for name in plan.contenders}
        for each in entrants.values():
            running.callback(each.close)
        numbers = sorted({clients for each in entrants.values() for clients in each.clients()})
        for repeat, clients in itertools.product(range(plan.repeats), numbers):
            report.progress.print(f"serve: repeat {repeat + 1} of {plan.repeats}, {clients} clients")
            for name in plan.contenders if repeat % 2 == 0 else reversed(plan.contenders):
                if name in failed or clients not in entrants[name].clients():
                    continue
                try:
                    figure = entrants[name].measure(clients)
                except StartFailed as error:
                    report.progress.print(f"serve: {name} failed. {error}", markup=False)
                    failed[name] = {"benchmark": "serve", "contender": name, "failed": str(error).split("\n")[0]}
                    continue
                measured.setdefault((name, clients), []).append(figure)
                report.progress.print(f"  {name}: {figure['output_tokens_per_s']:.0f} tokens/s")
    texts = {name: each.text for name, each in entrants.items()}
    return [
        *(
            {
                "benchmark": "serve",
                "contender": name,
                "load": "closed",
                "clients": clients,
                "shared_tokens": plan.shared_tokens,
                "same_words_as_generate": _agreement(texts, name),
                **over_repeats(repeats),
            }
            for (name, clients), repeats in sorted(
                measured.items(), key=lambda item: (plan.contenders.index(item[0][0]), item[0][1])
            )
        ),
        *failed.values(),
        *_ratios(measured),
    ]


def _agreement(texts: dict[str, str], name: str) -> float | None:
    """Return the share of words before this contender's greedy answer leaves `generate`'s.

    The same weights and prompt give the same words; in 16 bits another order of additions may turn one, and
    all after it. A low share is a reason to look, not a fault by itself.
    """
    if not texts.get(BARE):
        return None
    expected, given = texts[BARE].split(), texts[name].split()
    same = next((i for i, pair in enumerate(zip(expected, given, strict=False)) if pair[0] != pair[1]), len(given))
    return same / len(expected)


def _ratios(measured: dict[tuple[str, int], list[Figure]]) -> list[Figure]:
    figures: list[Figure] = []
    for (name, clients), theirs in measured.items():
        ours = measured.get((OURS, clients))
        if name == OURS or ours is None or len(ours) != len(theirs):
            continue
        # Where others were cut before a first token theirs is too short and the ratio too large: a bound. Where we
        # were, there is none.
        metrics = ["output_tokens_per_s"]
        if not any(figure["unanswered"] for figure in ours) and "first_token_s_p99" in theirs[0]:
            metrics.append("first_token_s_p99")
        figures.append(
            {
                "benchmark": "serve",
                "of": OURS,
                "to": name,
                "clients": clients,
                "bound": any(figure["unanswered"] for figure in theirs),
                "ratio": {key: ratios([f[key] for f in ours], [f[key] for f in theirs]) for key in metrics},
            }
        )
    return figures


async def load_url(target: Target, prompts: Iterator[str], options: argparse.Namespace) -> list[Figure]:
    """Put a server that runs somewhere under load: a sweep of clients, or one rate of arrivals."""
    await ask_once(target, next(prompts), options.limit_seconds)
    what = {"benchmark": "serve", "contender": target.url}
    figures: list[Figure] = []
    async with asking(target) as ask:
        if options.rate:
            run = await open_loop(
                ask,
                prompts,
                rate=options.rate,
                num_requests=options.requests,
                seed=options.seed,
                limit_s=options.limit_seconds,
            )
            return [{**what, "load": "open", "rate": options.rate, **over_repeats([summary(run)])}]
        for clients in options.clients:
            runs = [
                await closed_loop(
                    ask,
                    prompts,
                    clients=clients,
                    min_seconds=options.min_seconds,
                    limit_s=options.limit_seconds,
                )
                for _ in range(options.repeats)
            ]
            measures = over_repeats([summary(run) for run in runs])
            figures.append({**what, "load": "closed", "clients": clients, **measures})
    return figures


def main() -> None:
    options = _parser().parse_args()
    stop_children_on_sigterm()
    report.announce(described := report.machine())
    if options.url:
        try:
            target = Target(
                options.url,
                options.max_new_tokens,
                model=options.model,
                extra=options.extra,
                headers=dict(header.split(": ", 1) for header in options.header),
            )
        except ValueError as error:
            raise SystemExit(str(error)) from None
        if options.tokenizer:
            prompts = prompts_for(
                options.tokenizer,
                options.prompt_tokens,
                count=1024,
                seed=options.seed,
                num_shared=options.shared_tokens,
            )
        else:
            prompts = plain_prompts(options.prompt_tokens, count=1024, seed=options.seed)
        figures = uvloop.run(load_url(target, itertools.cycle(prompts), options))
    else:
        plan = Plan(
            contenders=options.contenders,
            clients=options.clients,
            repeats=options.repeats,
            prompt_tokens=options.prompt_tokens,
            shared_tokens=options.shared_tokens,
            max_new_tokens=options.max_new_tokens,
            min_seconds=options.min_seconds,
            limit_s=options.limit_seconds,
            seed=options.seed,
        )
        figures = compare(options.model_dir or checkpoint(options.shape, options.dtype), plan)
    report.serve_card(figures)
    report.print_json_lines(figures)
    if options.out:
        path = report.results_path(described, options.out)
        report.write_results(described, figures, path)
        report.plot(figures, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan = Plan()
    add = parser.add_argument
    add("--contenders", type=_names, default=plan.contenders, help=f"of {','.join(ALL)}")
    add("--clients", type=_numbers, default=plan.clients, help="numbers of streams open at once: 1,8,32")
    add("--repeats", type=int, default=plan.repeats)
    add("--prompt-tokens", type=int, default=plan.prompt_tokens)
    add("--shared-tokens", type=int, default=0, help="of each prompt, the first so many are the same in all")
    add("--max-new-tokens", type=int, default=plan.max_new_tokens)
    add("--min-seconds", type=float, default=plan.min_seconds, help="clients ask again until then")
    add("--limit-seconds", type=float, default=plan.limit_s, help="what has not ended by then is cut")
    add("--seed", type=int, default=plan.seed, help="of prompts and arrivals")
    add("--model-dir", type=Path, help="weights to serve; default: random ones of --shape")
    add("--shape", choices=SHAPES, default="100m")
    add("--dtype", default="bfloat16")
    add("--url", help="load this instead of starting anything: a V1 or an OpenAI URL")
    add("--model", default="", help="with an OpenAI --url: the model's name")
    add("--header", action="append", default=[], help="with --url: 'Authorization: Api-Key ...'")
    add(
        "--extra",
        type=json.loads,
        default={},
        help="with --url: more body fields, as JSON ('min_new_tokens')",
    )
    add("--tokenizer", type=Path, help="with --url: directory of its tokenizer.json, for exact prompt lengths")
    add("--rate", type=float, help="with --url: an open loop of this many arrivals a second")
    add("--requests", type=int, default=100, help="with --rate: how many arrive")
    add("--out", type=Path, help="directory for results and plot")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(ALL):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(ALL)}")
    return names


if __name__ == "__main__":
    main()
