"""`python -m benchmarks.clock_device`: a clock for a device shows how long one would wait between steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from transformers import MistralForCausalLM

from benchmarks import clock_device
from benchmarks.clock_device import ClockRunner, Pending
from benchmarks.models import checkpoint
from model_server.memory import Segment
from model_server.slots import Slots


def test_who_looks_into_a_steps_logits_waits_until_it_is_ready(model: MistralForCausalLM) -> None:
    slots = Slots(model.config, num_slots=2, slot_len=64, dtype=model.dtype, device=model.device)
    runner = ClockRunner(model, slots, step_s=0.2, told_later=True)
    decode = [Segment(0, 5, [7])]

    began_s = time.perf_counter()
    logits = runner.forward(decode, [], [0])
    assert isinstance(logits, Pending)
    assert logits.ready_s >= began_s + 0.2
    assert type(logits[:1]) is torch.Tensor
    assert time.perf_counter() >= logits.ready_s

    time.sleep(0.05)
    runner.forward(decode, [], [0])
    [wait_s] = runner.waits_s
    assert wait_s >= 0.05


def test_server_with_a_clock_answers_and_tells_what_its_device_waited(tmp_path: Path) -> None:
    model_dir = checkpoint("tiny", "float32", tmp_path)
    figures = clock_device.compare(model_dir, steps_ms=[1], clients=2, repeats=1, seconds=0)

    assert [(figure["told"], figure["errors"]) for figure in figures] == [("at once", 0), ("later", 0)]
    assert all(figure["device_waits_s"]["median"] > 0 for figure in figures)
    assert figures[0]["of_told_at_once"]["median"] == pytest.approx(1)
    clock_device.card(figures)
