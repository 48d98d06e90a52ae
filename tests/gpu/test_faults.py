"""A broken device ends the engine, and Kubernetes restarts the container, because the device stays broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from model_server.compute.cpu.environment import ALLOC_CONF, set_defaults


def test_device_side_assert_ends_the_engine_and_answers_its_requests(device: torch.device) -> None:
    """The engine does not retry the step in halves, as it does for a step with one failing sequence."""
    command = [sys.executable, "-m", "tests.gpu.device_assert", device.type]
    environ = {**os.environ}
    set_defaults(environ)
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100, check=False)

    assert ended.returncode == 0, ended.stderr[-2000:]
    result = json.loads(ended.stdout)
    assert result["dead"].startswith(
        "the batch thread died: AcceleratorError: CUDA error: device-side assert triggered"
    )
    assert result["answers"] == ["The engine stopped while it worked on the request; send it again."] * 2


def test_setting_that_lets_the_process_live_on_is_one_that_pytorch_knows() -> None:
    """PyTorch raises a ValueError for an unknown setting, and accepts only the spelling "True"."""
    torch._C._accelerator_setAllocatorSettings(ALLOC_CONF)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_allocator_settings_of_the_operator_stay_as_they_are(name: str) -> None:
    environ = {name: "expandable_segments:True"}

    set_defaults(environ)

    assert {key: value for key, value in environ.items() if "ALLOC_CONF" in key} == {name: "expandable_segments:True"}
