"""`python -m benchmarks.clock_device`: a clock for a device shows how long one would wait between steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from transformers import MistralForCausalLM

from benchmarks import clock_device
from benchmarks.clock_device import AFTER, AHEAD, ClockRunner, Pending
from benchmarks.models import checkpoint
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.dense import DenseKVCache


def test_who_looks_into_a_steps_logits_waits_until_it_is_ready(model: MistralForCausalLM) -> None:
    slots = DenseKVCache(model.config, max_batch_size=2, max_sequence_tokens=64, dtype=model.dtype, device=model.device)
    runner = ClockRunner(model, slots, step_s=0.2, ahead=True)
    decode = [TokenRange(0, 5, [7])]

    began_s = time.perf_counter()
    logits = runner.forward(decode, [], [0])
    assert isinstance(logits, Pending)
    assert logits.ready_s >= began_s + 0.2
    values, token = logits[:1].topk(3)[0], logits.argmax(-1)
    assert (values.shape, token.device.type) == ((1, 3), "cpu")
    assert time.perf_counter() < logits.ready_s
    assert token.tolist() == [int(logits.argmax())]
    assert time.perf_counter() >= logits.ready_s

    time.sleep(0.05)
    late = runner.forward(decode, [], [0])
    early = runner.forward(decode, [], [0])
    assert isinstance(late, Pending)
    assert isinstance(early, Pending)
    assert early.ready_s == late.ready_s + 0.2
    wait_s, no_wait_s = runner.waits_s
    assert wait_s >= 0.05
    assert no_wait_s == 0


def test_server_with_a_clock_answers_and_tells_what_its_device_waited(tmp_path: Path) -> None:
    model_dir = checkpoint("tiny", "float32", tmp_path)
    figures = clock_device.compare(model_dir, steps_ms=[1], clients=2, repeats=1, seconds=0)

    assert [(figure["launched"], figure["errors"]) for figure in figures] == [(AFTER, 0), (AHEAD, 0)]
    assert figures[0]["device_waits_s"]["median"] > 0
    assert figures[0]["of_launched_after"]["median"] == pytest.approx(1)
    clock_device.card(figures)
