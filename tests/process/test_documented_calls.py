"""The calls that the README and the docs show, run against a server as they are written.

Commands that name a cluster (kubectl, helm, `--service`, a gateway) are not run here; tests/chart runs those of Helm.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from mistral_cli.app import app
from tests.support.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LOCAL = "http://localhost:8080"


def commands(program: str) -> list[str]:
    """Return the shell commands of all pages that start with this program, each on one line."""
    found = []
    for page in PAGES:
        lines = iter(page.read_text().splitlines())
        for line in lines:
            if re.match(rf"\s*(\.venv/bin/)?{program} ", line):
                while not is_complete(line):
                    line = line.removesuffix("\\") + "\n" + next(lines)
                found.append(line.strip())
    return found


def is_complete(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return not command.endswith("\\")


CALLS = sorted({command for command in commands("curl") if LOCAL in command and "openapi" not in command})


def test_the_readme_and_the_docs_show_calls() -> None:
    assert len(CALLS) >= 6


@pytest.mark.parametrize("call", CALLS)
def test_a_documented_call_is_answered(call: str, tool_server: ServerProcess) -> None:
    arguments = shlex.split(call.replace(LOCAL, tool_server.url))

    done = subprocess.run([*arguments, "--silent", "--fail-with-body", "--max-time", "100"], capture_output=True)

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("command", sorted(set(commands("mistral"))))
def test_a_documented_command_has_only_options_that_exist(command: str) -> None:
    _, *words = shlex.split(command, comments=True)
    known = get_command(app)
    while subcommands := getattr(known, "commands", None):
        known = subcommands[words.pop(0)]
    options = {option for parameter in known.params for option in parameter.opts + parameter.secondary_opts}

    assert {word.partition("=")[0] for word in words if re.match(r"-{1,2}[a-z]", word)} <= options
