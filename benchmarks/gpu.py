"""Tests the code on a GPU, then measures a model of Mistral 7B's shape.

    python -m benchmarks.gpu                       # about 9 minutes on an H100 and memcheck; no download
    python -m benchmarks.gpu --device cpu --tiny   # a rehearsal without a card: the same code on a tiny model

Writes build/gpu.json and build/gpu.md after every step. A step that fails is recorded, the others run, and the exit
code is 1. Each step of tests is a process of its own: after an illegal access nothing more runs on the card in that
process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import re
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import uvloop

from benchmarks import report, roofline, serve
from benchmarks.checkpoint import CACHE_DIR, checkpoint, prompts_for
from benchmarks.figures import Figure
from benchmarks.process import START_LIMIT_S, Program, free_port, stop_children_on_sigterm
from benchmarks.systems import OURS, SYSTEMS, Plan, System

OUT = Path("build")
TESTS = {
    "1. no fallback is taken": ("test_kernels.py", ""),
    "2. attention at 7B's geometry": ("test_attention.py", ""),
    "3. no hidden wait": ("test_steps.py", "wait_for_nothing"),
    "4. overlap changes no answer": ("test_steps.py", "with_overlap"),
    "5. a short prompt beside a long one": ("test_7b.py", "short_prompt"),
    "6. memory at the limits": ("test_7b.py", "full_batch"),
    "7. kernels of a step": ("test_7b.py", "few_kernels"),
    "8. a device-side assert": ("test_faults.py", ""),
}
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
"""Without the errors of CUDA's API: PyTorch and cuBLAS ask the driver for functions that it may not have."""
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""Every tensor is an allocation of its own, so that an access beside it is seen. A graph cannot be captured so."""
TEST_LIMIT_S, SANITIZER_LIMIT_S = 180, 300
LENGTHS, CLIENTS, MAX_LEN, NEW_TOKENS = (128, 1024, 4096), (1, 8, 32, 64), 4352, 64
VLLM = "vllm"
VLLM_FLAGS = (
    "serve", "{model_dir}", "--load-format", "dummy", "--dtype", "float16", "--max-model-len", str(MAX_LEN),
    "--max-num-seqs", str(max(CLIENTS)), "--host", "127.0.0.1", "--port", "{port}",
)  # fmt: skip
"""Random weights of its own, and everything else as its users start it."""


class Skipped(Exception):
    """A step cannot run here; the message says why."""


def run_tests(
    file: str,
    keywords: str,
    *,
    on_card: bool,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    limit_s: float = TEST_LIMIT_S,
) -> Figure:
    """Run tests in a process of their own; return the figures that they record.

    Raises:
        RuntimeError: tests failed, or their process died or took too long; the message has the reasons.
    """
    xml = OUT / "gpu-tests.xml"
    xml.unlink(missing_ok=True)
    selected = " and ".join(filter(None, (keywords, "" if on_card else "stand")))
    command = [*prefix, sys.executable, "-m", "pytest", "-q", f"tests/gpu/{file}", "-k", selected, f"--junitxml={xml}"]
    command += ["-p", "no:cacheprovider", "-o", "junit_family=xunit1", "-o", f"timeout={limit_s - 10}"]
    with Program([*command, *(["-m", "gpu"] if on_card else [])], environment) as tests:
        code, output = tests.exit_code(limit_s), tests.log().strip()
    if not xml.exists():
        raise RuntimeError(f"exit code {code}: {output[-400:]}")
    cases = ElementTree.parse(xml).findall(".//testcase")  # noqa: S314 - this program's own pytest wrote it
    figures = {p.attrib["name"]: json.loads(p.attrib["value"]) for case in cases for p in case.iter("property")}
    bad = [(case, child) for case in cases for child in case if child.tag in ("failure", "error")]
    if bad or code:
        reasons = [f"{case.attrib['name']}: {child.attrib['message'][:200]}" for case, child in bad]
        raise RuntimeError("; ".join(reasons) or f"exit code {code}: {output[-400:]}")
    return {"tests": len(cases), **figures}


def check_memory(*, on_card: bool) -> Figure:
    if not shutil.which(SANITIZER[0]):
        raise Skipped("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    check = functools.partial(
        run_tests, "test_kernels.py", on_card=on_card, prefix=SANITIZER, limit_s=SANITIZER_LIMIT_S
    )
    of_type = "give_what_plain_attention_gives and not bfloat16"
    each_tensor, graphs = check(f"{of_type} and False", environment=UNCACHED), check(f"{of_type} and True")
    return {"tests": each_tensor["tests"] + graphs["tests"]}


def decode_limits(*, on_card: bool) -> list[Figure]:
    tiny = roofline.Plan("cpu", "tiny", "float32", (16,), batch_sizes=(1, 2), contexts=(8,), steps=3, seconds=0)
    figures = roofline.measure(roofline.GPU if on_card else tiny)
    gc.unfreeze()
    _free_card()
    return figures


def _free_card() -> None:
    """Free this process's GPU memory, because the next server needs nearly all of it."""
    gc.collect()
    torch.cuda.empty_cache()


def served(system: System, model_dir: Path, lengths: Sequence[int], plan: Plan) -> list[Figure]:
    """Start a server and load it with prompts of each length, from each number of clients."""
    _free_card()
    port, figures = free_port(), []
    target = dataclasses.replace(
        system.target(model_dir, port, plan.max_new_tokens), extra={"ignore_eos": True} if system.title == VLLM else {}
    )
    with system.program(model_dir, port) as server:
        server.wait_until_ready(port, system.ready_path, START_LIMIT_S)
        for length in lengths:
            prompts = itertools.cycle(prompts_for(model_dir, length, count=max(64, 2**18 // length)))
            for figure in uvloop.run(serve.load_url(target, prompts, plan)):
                figures.append({**figure, "system": system.title, "prompt_length": length})
                if figure["errors"]:
                    raise RuntimeError(f"{figure['error_examples']} {server.log_end()}")
        if system.title != VLLM:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as metrics:
                failed = re.findall(r"^mistral_gpu_(\w+) ([1-9].*)$", metrics.read().decode(), re.MULTILINE)
            figures.append({"system": system.title, "memory": dict(failed) or "no failed allocation"})
    return figures


def serve_ours(*, on_card: bool) -> list[Figure]:
    return served(_ours(on_card=on_card), _checkpoint(on_card=on_card), *_load(on_card=on_card))


def _ours(*, on_card: bool) -> System:
    flags = ("--max_batch_size", str(max(CLIENTS)), "--max_model_len", str(MAX_LEN))
    command = (*SYSTEMS[OURS].command, *flags, "--dtype", "float16" if on_card else "float32")
    return dataclasses.replace(SYSTEMS[OURS], command=command)


def _checkpoint(*, on_card: bool) -> Path:
    shape, dtype, device = ("7b", "float16", "cuda") if on_card else ("tiny", "float32", "cpu")
    return checkpoint(shape, dtype, CACHE_DIR, device=device)


def serve_arenas(*, on_card: bool) -> list[Figure]:
    """Serve with an arena of the C library's allocator for each thread, as a GPU's server without ADR 0010 would."""
    plain = _ours(on_card=on_card)
    arenas = dataclasses.replace(plain, title="this server, 8 arenas", environment={"MALLOC_ARENA_MAX": "8"})
    lengths, plan = _load(on_card=on_card)
    return served(arenas, _checkpoint(on_card=on_card), lengths[:1], plan)


def serve_vllm(*, on_card: bool) -> list[Figure]:
    beside_python = Path(sys.executable).with_name("vllm")
    command = str(beside_python) if beside_python.exists() else shutil.which("vllm")
    if command is None or not on_card:
        raise Skipped("vLLM is not installed" if command is None else "vLLM is measured on a card only")
    vllm = System(VLLM, (command, *VLLM_FLAGS), "/health", "/v1/completions", environment={"VLLM_NO_USAGE_STATS": "1"})
    return served(vllm, _checkpoint(on_card=True), *_load(on_card=True))


def _load(*, on_card: bool) -> tuple[Sequence[int], Plan]:
    plan = Plan(clients=CLIENTS, repeats=1, max_new_tokens=NEW_TOKENS, min_seconds=2, limit_s=60)
    if on_card:
        return LENGTHS, plan
    return (16,), dataclasses.replace(plan, clients=(1, 2), max_new_tokens=4, min_seconds=0)


def steps(*, on_card: bool) -> dict[str, Callable[[], Any]]:
    """Return the steps in order, each by its title."""
    # The suite runs all tests with stand-ins; the rehearsal needs one that is quick.
    tests = TESTS if on_card else {"tests": ("test_attention.py", "prompt_chunks")}
    others: dict[str, Callable[..., Any]] = {
        "decode limits": decode_limits,
        "serve ours": serve_ours,
        "serve ours, 8 arenas": serve_arenas,
        "serve vLLM": serve_vllm,
        "memcheck": check_memory,  # last: it takes minutes
    }
    return {
        **{title: functools.partial(run_tests, *tests[title], on_card=on_card) for title in tests},
        **{title: functools.partial(others[title], on_card=on_card) for title in others},
    }


def run(all_steps: dict[str, Callable[[], Any]], write: Callable[[Sequence[Figure]], None]) -> list[Figure]:
    """Run each step; return for each its outcome, seconds and figures, or why it failed or was skipped.

    Args:
        write: writes the results so far: a rented machine may stop before the last step.
    """
    done: list[Figure] = []
    for title, work in all_steps.items():
        report.progress.print(title)
        began_s, result = time.monotonic(), {}
        try:
            outcome, result = "passed", {"figures": work()}
        except Skipped as why:
            outcome, result = "skipped", {"reason": str(why)}
        except Exception as error:
            outcome, result = "failed", {"reason": f"{type(error).__name__}: {error}"}
        done.append({"step": title, "outcome": outcome, "seconds": round(time.monotonic() - began_s, 1), **result})
        report.progress.print(f"  {outcome} {result.get('reason', '')}", markup=False)
        write(done)
    return done


def markdown(machine: Figure, done: Sequence[Figure]) -> str:
    """Return the outcomes and the figures as tables."""
    name = machine.get("gpu", machine["cpu"])
    lines = [
        f"# {name}, {machine['date']}, commit {machine['commit']}",
        "",
        "| step | outcome | s | |",
        "|---|---|---|---|",
    ]
    for step in done:
        figures = step.get("figures", {})
        short = figures if isinstance(figures, dict) else {}
        note = step.get("reason") or ", ".join(f"{key}: {value}" for key, value in short.items())
        lines.append(f"| {step['step']} | {step['outcome']} | {step['seconds']} | {' '.join(note.split())[:300]} |")
    rows = [f for step in done if isinstance(step.get("figures"), list) for f in step["figures"]]
    lines += [
        "",
        "| | sequences | prompt tokens | tokens/s | first token, ms | of bandwidth | of data sheet |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in rows:
        if f.get("what") == "decode":
            limits = [f"{f[of]:.0%}" if of in f else "" for of in ("of_bandwidth", "of_data_sheet")]
            cells = ["decode step", f["batch_size"], f["context"], f"{f['tokens_per_s']['median']:.0f}", "", *limits]
        elif f.get("what") == "first token":
            cells = ["prefill", 1, f["prompt_tokens"], "", f"{1000 * f['first_token_s']['median']:.1f}", "", ""]
        elif "clients" in f:
            first_ms = 1000 * f["first_token_s_p50"]["median"]
            cells = [
                f["system"],
                f["clients"],
                f["prompt_length"],
                f"{f['output_tokens_per_s']['median']:.0f}",
                f"{first_ms:.0f}",
                "",
                "",
            ]
        else:
            continue
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="required with --device cpu: a tiny model, nothing to judge"
    )
    options = parser.parse_args()
    on_card = options.device == "cuda"
    if on_card == options.tiny:
        parser.error("--tiny goes with --device cpu, and only with it.")
    if on_card and not torch.cuda.is_available():
        print("There is no CUDA device here. Rehearse with --device cpu --tiny.", file=sys.stderr)
        return 1
    stop_children_on_sigterm()
    OUT.mkdir(exist_ok=True)
    machine = report.machine()

    def write(done: Sequence[Figure]) -> None:
        (OUT / "gpu.json").write_text(json.dumps({"machine": machine, "steps": report.rounded(done)}, indent=1) + "\n")
        (OUT / "gpu.md").write_text(markdown(machine, done))

    done = run(steps(on_card=on_card), write)
    print((OUT / "gpu.md").read_text())
    return int(any(step["outcome"] == "failed" for step in done))


if __name__ == "__main__":
    sys.exit(main())
