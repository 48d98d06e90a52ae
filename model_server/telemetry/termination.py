"""The termination message: why this process ends, for `kubectl describe pod` and for the next start's log.

A container that the kubelet restarts keeps its pod's `/tmp`, where the next process finds the reason.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

TERMINATION_LOG = Path("/dev/termination-log")


def _reason_file() -> Path:
    return Path(tempfile.gettempdir()) / "mistral-termination-reason"


def write(reason: str, *, for_next_start: bool = False) -> None:
    """Write the reason why this process ends; a failure to write is ignored."""
    # Only where the file exists: outside Kubernetes it would be a stray file.
    files = [TERMINATION_LOG] if TERMINATION_LOG.exists() else []
    if for_next_start:
        files.append(_reason_file())
    for file in files:
        with contextlib.suppress(OSError):
            file.write_text(f"{reason}\n")


def pop_reason() -> str | None:
    """Return the reason that the last process wrote, once."""
    with contextlib.suppress(OSError):
        reason = _reason_file().read_text().strip()
        _reason_file().unlink()
        return reason or None
    return None
