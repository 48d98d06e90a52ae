"""The record of a rollout, with which the next run can finish or revert it. It is JSON in an annotation of the lock."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any


class Progress(StrEnum):
    ROLLING = "rolling"
    REVERTING = "reverting"
    PROMOTED = "promoted"
    REVERTED = "reverted"


@dataclass(frozen=True)
class Record:
    """Saved before the first patch. Every step that it implies can be repeated."""

    image: str
    previous_image: str
    stable: str
    """The version that had all the traffic when the rollout began."""
    percent: int | None
    """`canaryTrafficPercent` as it was, put back at the end."""
    initial_scale: str | None
    """The `initial-scale` annotation as it was."""
    strategy: str
    progress: Progress
    started: str
    changed: str
    """When the last patch was sent; older events do not count."""
    baseline: dict[str, Any] | None = None
    """Swap: measurements of the stable version, made while it ran."""
    reason: str = ""
    """Why it is reverted."""

    @property
    def unfinished(self) -> bool:
        return self.progress in (Progress.ROLLING, Progress.REVERTING)

    @property
    def changed_at(self) -> datetime:
        return datetime.fromisoformat(self.changed)

    def at(self, now: datetime, **fields: Any) -> Record:
        """Return a copy with these fields, changed now."""
        return replace(self, changed=timestamp(now), **fields)


def timestamp(now: datetime) -> str:
    return now.astimezone(UTC).isoformat(timespec="microseconds")


def dump(record: Record) -> str:
    return json.dumps(asdict(record), separators=(",", ":"))


def load(text: str | None) -> Record | None:
    """Read a record; None when there is none.

    Raises:
        ValueError: it was written by something else.
    """
    if not text:
        return None
    try:
        fields = json.loads(text)
        return Record(**{**fields, "progress": Progress(fields["progress"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"The record of the last rollout cannot be read: {error}") from error
