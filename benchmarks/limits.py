"""What this machine allows and how near to it a decode step comes, without HTTP.

    python -m benchmarks.limits                   on a CPU: 100M parameters, matmuls in three dtypes
                                                  on a GPU: Mistral 7B's shape, random weights made on the card
    python -m benchmarks.limits --shape tiny      the same path in seconds

Two ceilings: a loop's matmuls alone (`ceilings.Matmuls`), timed in turn with its steps, and bandwidth: a step must
read every weight but the embedding table once, and every row's keys and values. The weights are random, so nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.ceilings import Matmuls, bandwidth, times_s
from benchmarks.decoding import MakeDecoder, our_loop, profile_steps, step_times_s, transformers_loop
from benchmarks.figures import Figure, spread
from benchmarks.models import SHAPES, mistral_config, random_mistral
from model_server.compute.kv_cache.base import kv_bytes_per_token


@dataclass(frozen=True)
class Plan:
    device: str
    shape: str
    dtype: str
    matmul_dtypes: Sequence[str]
    first_token_lengths: Sequence[int]
    rows: Sequence[int] = (1, 8, 32, 64)
    context: int = 64
    """Prompt tokens of each row before its first step."""
    steps: int = 32
    seconds: float = 1.0
    """Budget of one point."""


CPU = Plan("cpu", "100m", "bfloat16", ("float32", "bfloat16", "float16"), (64, 256, 1024))
GPU = Plan("cuda", "7b", "float16", ("float16", "bfloat16"), (128, 1024, 4096), context=128, steps=64)


def default_plan(*, quick: bool = False) -> Plan:
    """Return what to measure on this machine; quick: less of it."""
    plan = GPU if torch.cuda.is_available() else CPU
    if not quick:
        return plan
    return dataclasses.replace(
        plan,
        matmul_dtypes=(plan.dtype,),
        first_token_lengths=plan.first_token_lengths[:1],
        rows=(1, 8, 32),
        steps=8,
        seconds=0.8,
    )


def measure(plan: Plan) -> list[Figure]:
    """Return the ceilings and what the two decode loops reach of them."""
    what = {"benchmark": "limits", "device": plan.device, "shape": plan.shape}
    report.progress.print(f"limits: {plan.shape} on {plan.device}: bandwidth")
    bytes_per_s = bandwidth(plan.device)
    figures: list[Figure] = [{**what, "what": "bandwidth", "bytes_per_s": bytes_per_s}]
    torch.set_grad_enabled(False)
    # Before there is a model: a card of 24 GB does not hold 7B's weights twice.
    figures += [{**what, **figure} for figure in _matmuls(mistral_config(SHAPES[plan.shape]), plan)]
    model = random_mistral(SHAPES[plan.shape], getattr(torch, plan.dtype), plan.device)
    # Counted now: packed for oneDNN, projections are no parameters any more.
    read_bytes = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    gc.freeze()  # as the server does: what a model and its libraries are made of is not looked through again
    for name, prepare in (("transformers", transformers_loop), ("ours", our_loop)):
        make = prepare(model)
        for figure in _decode(make, model, plan, read_bytes, max(bytes_per_s.values())):
            figures.append({**what, "by": name, "dtype": plan.dtype, **figure})
    return figures


def _matmuls(config: Any, plan: Plan) -> Iterator[Figure]:
    """Time one step's matmuls, with the weights apart as in the checkpoint and side by side."""
    for dtype in plan.matmul_dtypes:
        for fused in (False, True):
            matmuls = Matmuls.made_for(config, getattr(torch, dtype), plan.device, fused=fused)
            for rows in plan.rows:
                report.progress.print(f"limits: matmul, {dtype}, {'fused' if fused else 'apart'}, {rows} rows")
                taken = times_s(functools.partial(matmuls.run, rows), plan.device, budget_s=plan.seconds / 4)
                figure = {"what": "matmul", "dtype": dtype, "fused": fused, "rows": rows}
                yield {**figure, "tokens_per_s": spread(rows / seconds for seconds in taken)}
            del matmuls
            _free()


def _decode(make: MakeDecoder, model: Any, plan: Plan, read_bytes: int, bytes_per_s: float) -> Iterator[Figure]:
    """Time a loop's steps, of which each reads `read_bytes` of weights, in turn with its matmuls alone."""
    matmuls = Matmuls.of(model)
    dtype, vocab_size = getattr(torch, plan.dtype), model.config.vocab_size
    longest = plan.context + plan.steps + 8
    for rows in plan.rows:
        report.progress.print(f"limits: decode, {rows} rows")
        _forget_peak(plan.device)
        prompts = _prompts(rows, plan.context, vocab_size)
        taken, matmuls_s = step_times_s(
            make(rows, longest),
            prompts,
            steps=plan.steps,
            budget_s=2 * plan.seconds,
            beside=functools.partial(matmuls.run, rows),
        )
        rate = spread(rows / seconds for seconds in taken)
        kv = rows * (plan.context + len(taken) // 2) * kv_bytes_per_token(model.config, dtype)
        allowed = rows * bytes_per_s / (read_bytes + kv)
        yield {
            "what": "decode",
            "rows": rows,
            "tokens_per_s": rate,
            "of_matmuls": statistics.median(matmuls_s) / statistics.median(taken),
            "of_bandwidth": rate["median"] / allowed,
            "bandwidth_allows_tokens_per_s": allowed,
            "peak_memory_bytes": _peak_bytes(plan.device),
        }
        _free()
    for length in plan.first_token_lengths:
        report.progress.print(f"limits: first token after {length} tokens")
        read = functools.partial(make(1, length + 1).prefill, _prompts(1, length, vocab_size))
        taken = times_s(read, plan.device, budget_s=0)
        yield {"what": "first token", "prompt_tokens": length, "first_token_s": spread(taken)}
    rows = plan.rows[min(1, len(plan.rows) - 1)]
    operators = profile_steps(make(rows, longest), _prompts(rows, plan.context, vocab_size))
    yield {"what": "profile", "rows": rows, "operators": operators[:12]}


def _prompts(rows: int, length: int, vocab_size: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, vocab_size) for _ in range(length)] for _ in range(rows)]


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes(device: str) -> int:
    """Return the most memory held since `_forget_peak`: the card's, or this process's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def card(figures: Sequence[Figure]) -> None:
    """Print the ceilings, what each loop reaches of them, and where a step's time goes."""
    kinds: dict[str, list[Figure]] = {}
    for figure in figures:
        if figure["benchmark"] == "limits":
            kinds.setdefault(figure["what"], []).append(figure)
    for figure in kinds.get("bandwidth", []):
        report.table(
            f"Memory bandwidth ({figure['device']})",
            ["", "GB/s"],
            [[name, f"{rate / 1e9:.1f}"] for name, rate in figure["bytes_per_s"].items()],
        )
    report.table(
        "What the matmuls of a step alone allow: tokens/s, median (least-most)",
        ["dtype", "weights", "rows", "tokens/s"],
        [
            [f["dtype"], "fused" if f["fused"] else "apart", str(f["rows"]), report.measured(f["tokens_per_s"])]
            for f in kinds.get("matmul", [])
        ],
    )
    report.table(
        "A decode step without a server",
        ["loop", "rows", "tokens/s", "of matmuls", "of bandwidth", "peak memory MB"],
        [
            [
                f["by"],
                str(f["rows"]),
                report.measured(f["tokens_per_s"]),
                f"{f['of_matmuls']:.0%}",
                f"{f['of_bandwidth']:.0%}",
                f"{f['peak_memory_bytes'] / 1e6:.0f}",
            ]
            for f in kinds.get("decode", [])
        ],
    )
    report.table(
        "Time to first token of one prompt, nothing else running",
        ["loop", "prompt tokens", "ms"],
        [
            [f["by"], str(f["prompt_tokens"]), report.measured(f["first_token_s"], scale=1000)]
            for f in kinds.get("first token", [])
        ],
    )
    for figure in kinds.get("profile", []):
        report.table(
            f"Where a decode step of {figure['rows']} rows spends its time: {figure['by']}",
            ["operator", "ms", "share"],
            [[op["operator"][:60], f"{op['ms']:.2f}", f"{op['share']:.0%}"] for op in figure["operators"]],
        )


def main() -> None:
    plan = default_plan()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.limits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=plan.device)
    add("--shape", choices=SHAPES, default=plan.shape)
    add("--dtype", default=plan.dtype, help="of the decode loops")
    add("--matmul-dtypes", type=_words, default=plan.matmul_dtypes)
    add("--rows", type=_numbers, default=plan.rows)
    add("--context", type=int, default=plan.context)
    add("--first-token-lengths", type=_numbers, default=plan.first_token_lengths)
    add("--steps", type=int, default=plan.steps)
    add("--seconds", type=float, default=plan.seconds, help="budget of one point")
    add("--out", type=Path, help="directory for the results")
    options = vars(parser.parse_args())
    out = options.pop("out")
    report.announce(described := report.machine())
    if options["dtype"] not in options["matmul_dtypes"]:
        options["matmul_dtypes"] = (*options["matmul_dtypes"], options["dtype"])
    figures = measure(Plan(**options))
    card(figures)
    report.print_json_lines(figures)
    if out:
        report.write_results(described, figures, report.results_path(described, out))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    main()
