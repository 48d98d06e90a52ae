"""LangChain, instructor and litellm as they are: they get structured output and call tools."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.server_process import ServerProcess

SCRIPT = Path(__file__).parents[1] / "support" / "framework_clients.py"
PYTHON = os.environ.get("FRAMEWORKS_PYTHON")


@pytest.mark.skipif(PYTHON is None, reason="FRAMEWORKS_PYTHON names no Python that has the frameworks")
@pytest.mark.timeout(600)
def test_frameworks_work_unchanged(tool_server: ServerProcess) -> None:
    ran = subprocess.run([str(PYTHON), SCRIPT, tool_server.url], capture_output=True, text=True, timeout=600)

    assert (ran.stdout, ran.returncode) == ("", 0), ran.stderr
