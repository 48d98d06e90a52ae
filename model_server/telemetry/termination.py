"""Why the last process died, said by the next one.

A container that the kubelet restarts keeps its pod's `/tmp`: the reason waits there for the next start's log, and in
`/dev/termination-log`, where `kubectl describe pod` shows it.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

TERMINATION_LOG = Path("/dev/termination-log")


def _file() -> Path:
    return Path(tempfile.gettempdir()) / "mistral-last-words"


def leave(reason: str, *, for_next_start: bool = False) -> None:
    """Write down why this process ends; nothing is said about a failure to do so."""
    # Written only where it exists: outside Kubernetes it would be a stray file.
    places = [TERMINATION_LOG] if TERMINATION_LOG.exists() else []
    if for_next_start:
        places.append(_file())
    for place in places:
        with contextlib.suppress(OSError):
            place.write_text(f"{reason}\n")


def take() -> str | None:
    """Return what the last process left, once."""
    with contextlib.suppress(OSError):
        reason = _file().read_text().strip()
        _file().unlink()
        return reason or None
    return None
