"""A measured value beside what was promised: kept, broken, or only told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks import report
from benchmarks.figures import Figure

Spread = dict[str, float]
"""Median, least and most of several measurements."""


@dataclass(frozen=True)
class Check:
    """One line of the card."""

    what: str
    measured: Spread | float | str
    promised: str = ""
    kept: bool | None = None
    """None: told for the reader, not promised."""

    def figure(self, promise: str) -> Figure:
        figure = {"benchmark": "promises", "promise": promise, "what": self.what, "measured": self.measured}
        return figure | ({} if self.kept is None else {"promised": self.promised, "kept": self.kept})


def at_least(what: str, measured: Spread | float, bound: float) -> Check:
    return Check(what, measured, f">= {bound:g}", _middle(measured) >= bound)


def at_most(what: str, measured: Spread | float, bound: float) -> Check:
    return Check(what, measured, f"<= {bound:g}", _middle(measured) <= bound)


def exactly(what: str, measured: float | str, expected: float | str) -> Check:
    return Check(what, measured, str(expected), measured == expected)


def told(what: str, measured: Spread | float | str) -> Check:
    return Check(what, measured)


def card(promise: str, sentence: str, checks: Iterable[Check]) -> None:
    """Print one promise with everything that was measured for it."""
    verdicts: dict[bool | None, str] = {None: "", True: "kept", False: "BROKEN"}
    rows = [[check.what, _shown(check.measured), check.promised, verdicts[check.kept]] for check in checks]
    report.table(f"{promise}: {sentence}", ["", "measured", "promised", ""], rows)


def broken(checks: Sequence[Check]) -> bool:
    return any(check.kept is False for check in checks)


def _middle(measured: Spread | float) -> float:
    return measured["median"] if isinstance(measured, dict) else measured


def _shown(measured: Spread | float | str) -> str:
    if isinstance(measured, str):
        return measured
    middle = _middle(measured)
    digits = 0 if middle == int(middle) or abs(middle) >= 100 else 2
    return report.measured(measured, digits=digits) if isinstance(measured, dict) else f"{measured:.{digits}f}"
