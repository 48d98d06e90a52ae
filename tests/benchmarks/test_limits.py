"""`python -m benchmarks.limits`, the command a GPU is measured with, on the smallest shape."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.models import SHAPES, mistral_config


def test_both_loops_are_held_against_the_same_limits() -> None:
    command = [sys.executable, "-m", "benchmarks.limits", "--device", "cpu", "--shape", "tiny", "--dtype", "bfloat16"]
    command += ["--matmul-dtypes", "bfloat16", "--rows", "1,2", "--steps", "4", "--seconds", "0.1", "--context", "8"]
    command += ["--first-token-lengths", "8"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = [json.loads(line) for line in out.splitlines() if line.startswith("{")]

    config = mistral_config(SHAPES["tiny"])
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config.intermediate_size + 2 * hidden
    read_bytes = 2 * (config.num_hidden_layers * layer + hidden + config.vocab_size * hidden)
    kv_bytes = 2 * 2 * config.num_hidden_layers * kv * (8 + 4 // 2)
    bytes_per_s = max(next(f for f in figures if f["what"] == "bandwidth")["bytes_per_s"].values())

    steps = {(f["by"], f["rows"]): f for f in figures if f["what"] == "decode"}
    assert steps.keys() == {(by, rows) for by in ("transformers", "ours") for rows in (1, 2)}
    for (_, rows), step in steps.items():
        allowed = rows * bytes_per_s / (read_bytes + rows * kv_bytes)
        assert step["bandwidth_allows_tokens_per_s"] == pytest.approx(allowed, rel=0.02)  # a step more or less of keys
        assert step["of_bandwidth"] == pytest.approx(step["tokens_per_s"]["median"] / allowed, rel=0.05)
    assert {f["what"] for f in figures} == {"bandwidth", "matmul", "decode", "first token", "profile"}
