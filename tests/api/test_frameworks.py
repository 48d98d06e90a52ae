"""LangChain, openai, instructor and litellm as they are: they get structured output, call tools and run whole loops."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from demo import make as demo_make
from tests.support.server_process import ServerProcess

SUPPORT = Path(__file__).parents[1] / "support"
PYTHON = os.environ.get("FRAMEWORKS_PYTHON")
pytestmark = [
    pytest.mark.skipif(PYTHON is None, reason="FRAMEWORKS_PYTHON names no Python that has the frameworks"),
    pytest.mark.timeout(600),
]


def run(script: str, server: ServerProcess) -> subprocess.CompletedProcess[str]:
    # litellm would otherwise look for prices on the network.
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [str(PYTHON), str(SUPPORT / script), server.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_frameworks_work_unchanged_on_random_weights(tool_server: ServerProcess) -> None:
    ran = run("framework_clients.py", tool_server)

    assert (ran.stdout, ran.returncode) == ("", 0), ran.stderr


def test_agents_and_loops_of_tools_reach_their_answer_on_the_demo_model(
    start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    model_dir = shutil.copytree(demo_make.make(), tmp_path / "model")  # the server's log is written beside it

    ran = run("demo_loops.py", start_server(model_dir=model_dir))

    assert (ran.stdout, ran.returncode) == ("", 0), ran.stderr
