"""`make gpu`, rehearsed without a card: every step's code runs, and a step that fails does not stop the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.process import ProgramFailed

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny"])
    return tmp_path


def test_the_rehearsal_runs_every_step_and_writes_both_files(results: Path) -> None:
    assert gpu.main() == 0

    steps = {step["step"]: step for step in json.loads((results / "gpu.json").read_text())["steps"]}
    assert {title: step["outcome"] for title, step in steps.items() if step["outcome"] != "skipped"} == {
        "tests": "passed",
        "roofline": "passed",
        "weights": "passed",
        "serve ours": "passed",
        "serve ours, 8 arenas": "passed",
    }
    served = [(figure["prompt_tokens"], figure["clients"]) for figure in steps["serve ours"]["figures"]]
    assert served == [(16, 1), (16, 2)]
    written = (results / "gpu.md").read_text()
    assert "| serve ours " in written
    assert "## serve ours, 8 arenas\n\nserve\n\n| system " in written


def test_a_failed_step_is_recorded_and_the_rest_runs_with_results_written_after_each(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_steps = (
        f"import json; steps = json.load(open('{results}/gpu.json'))['steps']\n"
        "print(json.dumps({'benchmark': 'steps so far', 'value': len(steps)}))"
    )
    steps = {
        "one": gpu.Step((sys.executable, "-c", "exit('no weights')")),
        "two": gpu.Step(("no-such-program",)),
        "three": gpu.Step((sys.executable, "-c", count_steps)),
    }
    monkeypatch.setattr(gpu, "steps", lambda tiny: steps)

    assert gpu.main() == 1
    done = json.loads((results / "gpu.json").read_text())["steps"]
    assert [(step["outcome"], step.get("figures")) for step in done] == [
        ("failed", None),
        ("skipped", None),
        ("passed", [{"benchmark": "steps so far", "value": 2}]),
    ]
    assert "no weights" in done[0]["reason"]
    assert done[1]["reason"] == "no-such-program is not installed"


def test_values_that_tests_record_are_figures() -> None:
    step = gpu.tests("test_attention.py", "block_border", "not gpu")

    [rates] = step.figures()
    assert rates["test"] == "decode attention, GB/s by batch size"


def test_a_step_without_a_test_fails() -> None:
    with pytest.raises(ProgramFailed, match="Exited with 5"):
        gpu.tests("test_kernels.py", "no_test_has_this_name", "not gpu").figures()


def test_a_request_that_fails_fails_its_step() -> None:
    with pytest.raises(ProgramFailed, match="Requests failed"):
        gpu.Step(("echo", '{"errors": 1}')).figures()


def test_memcheck_sees_each_tensor_without_graphs_and_then_graphs() -> None:
    steps = [gpu.steps(tiny=False)[title] for title in ("memcheck", "memcheck, graphs")]

    assert [step.environment for step in steps] == [{"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, {}]
    options = ("--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
    assert [step.command[:7] for step in steps] == [("compute-sanitizer", *options)] * 2


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
