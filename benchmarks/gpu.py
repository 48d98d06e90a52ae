"""Tests the code on a GPU, then measures a model of Mistral 7B's shape.

    python -m benchmarks.gpu                       # about 9 minutes on an H100 and memcheck; no download
    python -m benchmarks.gpu --device cpu --tiny   # a rehearsal without a card: the same code on a tiny model

Writes build/gpu.json and build/gpu.md after every step. A step that fails is recorded, the others run, and the exit
code is 1. Each step is a process of its own: its GPU memory is free afterwards, and after an illegal access nothing
more runs on the card in that process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.figures import Figure
from benchmarks.process import Program, ProgramFailed
from benchmarks.systems import SYSTEMS, VLLM

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
PYTHON = (sys.executable, "-m")


@dataclass(frozen=True)
class Step:
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    limit_s: float = 1200

    def figures(self) -> list[Figure]:
        """Run the command; return the figures that it prints, one JSON object a line.

        Raises:
            ProgramFailed: the command or a measured request failed; the message has the reason.
            ValueError: a line that begins as JSON is not JSON.
        """
        with Program(self.command, self.environment) as program:
            program.wait_for_exit(self.limit_s)
            figures = [json.loads(line) for line in program.log().splitlines() if line.startswith("{")]
            if any(figure.get("errors") or "failed" in figure for figure in figures):
                raise program.failure("Requests failed.")
        return figures


def tests(file: str, keywords: str, marker: str) -> Step:
    """Return a step of the tests of a file with these keywords and this mark."""
    command = (*PYTHON, "pytest", "-q", "-s", f"tests/gpu/{file}", "-k", keywords, "-m", marker)
    return Step((*command, "-p", "no:cacheprovider", "--tb=line", "-o", "timeout=170"), limit_s=180)


def memory_check(graphs: bool, marker: str) -> Step:
    test = tests("test_kernels.py", f"give_what_plain_attention_gives and not bfloat16 and {graphs}", marker)
    return Step((*SANITIZER, *test.command, "-o", "timeout=290"), {} if graphs else UNCACHED, limit_s=300)


def steps(*, tiny: bool) -> dict[str, Step]:
    """Return the steps in order, each by its title."""
    shape, dtype, device = ("tiny", "bfloat16", "cpu") if tiny else ("7b", "float16", "cuda")
    clients, lengths, marker = ("1,2", "16", "not gpu") if tiny else ("1,8,32,64", "128,1024,4096", "gpu")
    load = (
        *PYTHON, "benchmarks", "serve", "--shape", shape, "--clients", clients, "--repeats", "1",
        "--limit-seconds", "60", "--prompt-tokens",
    )  # fmt: skip
    ours = {"MISTRAL_MAX_BATCH_SIZE": "64", "MISTRAL_MAX_MODEL_LEN": "4352"}
    arenas = {**ours, "MALLOC_ARENA_MAX": "8"}  # as a server without ADR 0010
    # The suite runs the other tests with stand-ins.
    selected = {"tests": ("test_attention.py", "prompt_chunks")} if tiny else TESTS
    return {
        **{title: tests(*which, marker) for title, which in selected.items()},
        "roofline": Step((*PYTHON, "benchmarks", "roofline", "--shape", shape)),
        "weights": Step((*PYTHON, "benchmarks.checkpoint", shape, dtype, device)),
        "serve ours": Step((*load, lengths, "--systems", "ours"), ours),
        "serve ours, 8 arenas": Step((*load, lengths.split(",")[0], "--systems", "ours"), arenas),
        "serve vLLM": Step((*load, lengths, "--systems", VLLM), {"BENCHMARKS_VLLM_MEMORY": "0.92"}),
        # Last: they take minutes.
        "memcheck": memory_check(False, marker),
        "memcheck, graphs": memory_check(True, marker),
    }


def run(all_steps: Mapping[str, Step]) -> list[Figure]:
    """Run each step; return for each its outcome, seconds and figures, or why it failed or was skipped.

    The results so far are written after each step: a rented machine may stop before the last one.
    """
    machine = report.machine()
    done: list[Figure] = []
    for title, step in all_steps.items():
        report.progress.print(title)
        needed = SYSTEMS[VLLM].command[0] if VLLM in step.command else step.command[0]
        result: Figure = {"benchmark": "steps", "step": title, "outcome": "passed"}
        began_s = time.monotonic()
        if not shutil.which(needed):
            result |= {"outcome": "skipped", "reason": f"{needed} is not installed"}
        else:
            try:
                result["figures"] = step.figures()
            except (ProgramFailed, ValueError) as error:
                result |= {"outcome": "failed", "reason": str(error)}
        done.append({**result, "seconds": time.monotonic() - began_s})
        report.progress.print(f"  {result['outcome']} {result.get('reason', '')}", markup=False)
        write(machine, done)
    return done


def write(machine: Figure, done: Sequence[Figure]) -> None:
    (OUT / "gpu.json").write_text(json.dumps({"machine": machine, "steps": report.rounded(done)}, indent=1) + "\n")
    sections = [f"# {machine.get('gpu', machine['cpu'])}, {machine['date']}, commit {machine['commit']}"]
    sections.append(report.tables(done))
    sections += [f"## {step['step']}\n\n{report.tables(step['figures'])}" for step in done if step.get("figures")]
    (OUT / "gpu.md").write_text("\n\n".join(sections))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="required with --device cpu: nothing to judge")
    options = parser.parse_args()
    if (options.device == "cpu") != options.tiny:
        parser.error("--tiny goes with --device cpu, and only with it.")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here. Rehearse with --device cpu --tiny.", file=sys.stderr)
        return 1
    OUT.mkdir(exist_ok=True)
    done = run(steps(tiny=options.tiny))
    print((OUT / "gpu.md").read_text())
    return int(any(step["outcome"] == "failed" for step in done))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwinds as Ctrl-C does, which stops the programs
    sys.exit(main())
