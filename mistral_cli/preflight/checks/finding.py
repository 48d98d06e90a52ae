"""One line of the report: a check, its state, and the command that fixes what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """The result of one check; `UNKNOWN` is never success."""

    OK = "ok"
    MISSING = "missing"
    UNKNOWN = "cannot know"


@dataclass(frozen=True)
class Finding:
    """A check and what it found."""

    check: str
    state: State
    what: str
    command: str = ""
    """The command that fixes it; for `UNKNOWN`, the command that finds out."""

    def as_json(self) -> dict[str, str]:
        return {"check": self.check, "state": self.state.value, "what": self.what, "command": self.command}


def ok(check: str, what: str) -> Finding:
    return Finding(check, State.OK, what)


def missing(check: str, what: str, command: str) -> Finding:
    return Finding(check, State.MISSING, what, command)


def unknown(check: str, what: str, command: str) -> Finding:
    return Finding(check, State.UNKNOWN, what, command)


def result(findings: Iterable[Finding]) -> State:
    """Return the state of the whole: a certain failure outweighs what cannot be known."""
    states = {finding.state for finding in findings}
    return next((state for state in (State.MISSING, State.UNKNOWN) if state in states), State.OK)


EXIT_CODES = {State.OK: 0, State.MISSING: 1, State.UNKNOWN: 2}
