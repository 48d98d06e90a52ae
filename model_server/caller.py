"""The caller of the current HTTP call. The middleware sets it, and the call's requests carry it into the engine."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol


class CallTrace(Protocol):
    """The trace of a call; `telemetry.traces.Trace` implements it."""

    trace_id: str
    """32 hexadecimal digits."""

    def add_request(self, request: Any, outcome: str, ended_s: float) -> None:
        """Write the spans of a `Request` that has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a call."""

    key: str | None = None
    """The name of the caller's API key; None if the server needs no key."""
    trace: CallTrace | None = None
    """The call's trace; None if traces are off."""


caller: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039 - it is immutable
