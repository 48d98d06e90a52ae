"""`make gpu`, rehearsed without a card: every step's code runs, and a step that fails does not stop the others."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.process import StartFailed

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    monkeypatch.setattr(gpu, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny"])
    monkeypatch.setattr(gpu, "stop_children_on_sigterm", lambda: None)
    return tmp_path


def test_the_rehearsal_runs_every_step_and_writes_both_files(results: Path) -> None:
    assert gpu.main() == 0

    steps = {step["step"]: step for step in json.loads((results / "gpu.json").read_text())["steps"]}
    assert {title: step["outcome"] for title, step in steps.items() if step["outcome"] != "skipped"} == {
        "tests": "passed",
        "decode limits": "passed",
        "serve ours": "passed",
        "serve ours, 8 arenas": "passed",
    }
    assert steps["tests"]["figures"]["tests"] == 1
    assert [figure["clients"] for figure in steps["serve ours"]["figures"] if "clients" in figure] == [1, 2]
    assert "| this server | 2 | 16 |" in (results / "gpu.md").read_text()


def test_a_failed_step_is_recorded_and_the_rest_runs_with_results_written_after_each(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpu() -> None:
        raise gpu.Skipped("no GPU")

    def written_so_far() -> dict[str, int]:
        return {"steps": len(json.loads((results / "gpu.json").read_text())["steps"])}

    monkeypatch.setattr(gpu, "steps", lambda on_card: {"one": lambda: 1 / 0, "two": no_gpu, "three": written_so_far})

    assert gpu.main() == 1
    steps = json.loads((results / "gpu.json").read_text())["steps"]
    assert [(step["outcome"], step.get("reason"), step.get("figures")) for step in steps] == [
        ("failed", "ZeroDivisionError: division by zero", None),
        ("skipped", "no GPU", None),
        ("passed", None, {"steps": 2}),
    ]
    assert "| one | failed |" in (results / "gpu.md").read_text()


def test_a_failing_test_is_a_step_that_failed_with_its_reason() -> None:
    with pytest.raises(RuntimeError, match="exit code"):
        gpu.run_tests("test_kernels.py", "no_test_has_this_name", on_card=False)


def test_tests_that_take_too_long_are_stopped() -> None:
    with pytest.raises(StartFailed, match="Still running after 1 s"):
        gpu.run_tests("test_kernels.py", "", on_card=False, prefix=("sh", "-c", "sleep 100"), limit_s=1)


def test_memcheck_sees_each_tensor_without_graphs_and_then_graphs(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sanitizer that notes its options, runs the program and finds nothing."""
    sanitizer = results / "compute-sanitizer"
    sanitizer.write_text(
        '#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING" "$1" "$2" "$3" "$4" "$5" "$6" >>"$(dirname "$0")/options"\n'
        'shift 6\nexec "$@"\n'
    )
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{results}:{os.environ['PATH']}")

    assert gpu.check_memory(on_card=False) == {"tests": 2}
    options = "--tool memcheck --report-api-errors no --error-exitcode 9"
    assert (results / "options").read_text().splitlines() == [f"1 {options}", f" {options}"]


def test_every_step_of_tests_selects_tests() -> None:
    for file, keywords in gpu.TESTS.values():
        assert keywords in (Path("tests/gpu") / file).read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_card_it_says_how_to_rehearse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])

    assert gpu.main() == 1
    assert "--device cpu --tiny" in capsys.readouterr().err
