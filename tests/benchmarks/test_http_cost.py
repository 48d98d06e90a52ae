"""`python -m benchmarks.http_cost`: the same engine asked over HTTP and from inside its process."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import http_cost
from benchmarks.models import checkpoint
from benchmarks.process import StartFailed


def test_engine_is_asked_over_http_and_inside_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [figure] = http_cost.compare(checkpoint("tiny", "float32", tmp_path), clients=2, rounds=2)

    assert (figure["clients"], figure["rounds"]) == (2, 2)
    inside, over_http = figure["inside_tokens_per_s"], figure["over_http_tokens_per_s"]
    assert over_http["min"] / inside["max"] <= figure["of_inside"]["median"] <= over_http["max"] / inside["min"]
    http_cost.card([figure])
    assert "inside" in capsys.readouterr().out


def test_server_that_refuses_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_cost, "prompts_for", lambda *args, **options: ["word " * 100_000])
    with pytest.raises(StartFailed, match="over HTTP: HTTP 400"):
        http_cost.compare(checkpoint("tiny", "float32", tmp_path), clients=1, rounds=1)
