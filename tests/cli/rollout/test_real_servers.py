"""The gates between two servers of ours, each with a model: alike, and one with other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from mistral_cli.rollout.gates.measure import Meter, endpoint
from mistral_cli.rollout.gates.rules import GateResult, Gates, evaluate, load
from tests.support.server_process import ServerProcess
from tests.support.tiny_model import tiny_mistral

# Both servers share this machine's cores with the tests: only what does not depend on them is judged tightly.
GATES = replace(load(), requests=12, concurrency=3, max_new_tokens=16, ttft_slack_s=30, min_tokens_per_second_ratio=0)


def judged(gates: Gates, stable: ServerProcess, candidate: ServerProcess) -> dict[str, GateResult]:
    with closing(Meter(gates, {}, None)) as meter:
        figures = meter.compare(endpoint(stable.url), endpoint(candidate.url))
    return {result.name: result for result in evaluate(gates, *figures)}


def test_the_same_model_twice_passes_every_gate(
    start_server: Callable[..., ServerProcess], server: ServerProcess
) -> None:
    found = judged(GATES, server, start_server())
    assert {name: result.passed for name, result in found.items()} == dict.fromkeys(found, True)
    assert found["golden_distance"].value == 0


def test_other_weights_fail_by_their_text_and_by_nothing_else(
    start_server: Callable[..., ServerProcess], server: ServerProcess, model_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "model"
    shutil.copytree(model_dir, other)
    vocabulary = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    tiny_mistral(vocab_size=vocabulary, max_position_embeddings=8192, initializer_range=0.3).save_pretrained(other)
    found = judged(GATES, server, start_server("--model_dir", str(other)))
    assert [name for name, result in found.items() if not result.passed] == ["golden_distance"]
