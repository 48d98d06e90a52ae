"""The gates: thresholds, and the comparison of measurements with them.

A gate without enough data has not passed: `passed` is None, and the rollout measures again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

DEFAULT_FILE = Path(__file__).with_name("gates.yaml")
TTFT, TOKENS_PER_SECOND = "ttft_p95_ratio", "tokens_per_second_ratio"
SPEED_GATES = frozenset({TTFT, TOKENS_PER_SECOND})


@dataclass(frozen=True)
class Query:
    """A Prometheus query that must give one number; `{revision}`, `{namespace}` and `{name}` are filled in."""

    name: str
    query: str
    max: float | None = None
    min: float | None = None
    requests_query: str = ""
    """Gives the number of requests behind the figure; fewer than `requests` are no data."""


@dataclass(frozen=True)
class Gates:
    """The thresholds, with the load that measures them."""

    prompts: tuple[str, ...]
    max_edit_distance: float | None = 0.2
    """Share of the characters that may differ from the stable version's greedy text; None: the text is not compared."""
    requests: int = 40
    """Requests sent to each version at each step, and the least that a gate needs."""
    concurrency: int = 4
    max_new_tokens: int = 32
    request_timeout_s: float = 120
    max_error_rate: float = 0.0
    max_incomplete_rate: float = 0.0
    """Share of streams that end without their end marker."""
    max_ttft_ratio: float = 1.5
    """Time to first token, p95, relative to the stable version's at the same time."""
    ttft_slack_s: float = 0.1
    """Differences below this are noise, whatever their ratio."""
    min_tokens_per_second_ratio: float = 0.7
    speed_measurements: int = 3
    """Measurements that must all be too slow before a step fails: neighbours on a node disturb single ones."""
    hold_s: float = 0.0
    """Seconds that a step lasts at least, so that Prometheus has data."""
    prometheus_url: str = ""
    queries: tuple[Query, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One measured request."""

    prompt: str
    text: str = ""
    error: str = ""
    """Why the request failed; empty if it succeeded."""
    incomplete: bool = False
    """The stream began and did not reach its end marker."""
    ttft_s: float = math.nan
    tokens_per_second: float = math.nan


@dataclass(frozen=True)
class GateResult:
    """The result of one gate."""

    name: str
    value: float | None
    limit: float
    passed: bool | None
    """None: not enough data."""
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "limit": self.limit, "passed": self.passed, "why": self.why}


@dataclass(frozen=True)
class Measurements:
    """All answers of one version."""

    answers: Sequence[Answer] = field(default_factory=tuple)

    @property
    def good(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.error]


def load(file: Path = DEFAULT_FILE) -> Gates:
    """Read thresholds. The shipped file supplies what the file leaves out.

    Raises:
        ValueError: the file cannot be read, or names a gate that does not exist.
    """
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"--gates {file} cannot be read: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ValueError(f"--gates {file} must be a YAML mapping, such as max_error_rate: 0.01")
    known = {each.name for each in fields(Gates)}
    if unknown := sorted(set(content) - known):
        raise ValueError(f"--gates {file}: no gate is called {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    base = {} if file == DEFAULT_FILE else yaml.safe_load(DEFAULT_FILE.read_text("utf-8"))
    merged = {**base, **content}
    try:
        queries = tuple(Query(**query) for query in merged.pop("queries", ()))
        gates = Gates(prompts=tuple(map(str, merged.pop("prompts"))), queries=queries, **merged)
    except TypeError as error:
        raise ValueError(f"--gates {file}: {error}") from error
    if min(gates.requests, gates.concurrency, gates.speed_measurements, len(gates.prompts)) < 1:
        raise ValueError(f"--gates {file}: requests, concurrency, speed_measurements and prompts must be at least one.")
    return gates


def evaluate(gates: Gates, stable: Measurements, candidate: Measurements) -> list[GateResult]:
    """Compare the measurements of two versions with the limits."""
    enough = len(candidate.answers) >= gates.requests
    results = [
        _rate("error_rate", gates.max_error_rate, stable, candidate, enough, incomplete=False),
        _rate("incomplete_streams", gates.max_incomplete_rate, stable, candidate, enough, incomplete=True),
    ]
    if gates.max_edit_distance is not None:
        results.append(_golden(gates.max_edit_distance, stable, candidate))
    return results + _speed(gates, stable, candidate, enough)


def _rate(
    name: str, limit: float, stable: Measurements, candidate: Measurements, enough: bool, *, incomplete: bool
) -> GateResult:
    """Check the share of failed requests. If the stable version fails as often, the gate has no data."""
    failed = [answer for answer in candidate.answers if answer.error and answer.incomplete is incomplete]
    failed_before = [answer for answer in stable.answers if answer.error and answer.incomplete is incomplete]
    value = round(len(failed) / (len(candidate.answers) or 1), 4)
    if value > limit:
        if len(failed_before) / (len(stable.answers) or 1) >= value:
            return GateResult(name, value, limit, None, f"the stable version fails as often: {failed[0].error}")
        return GateResult(name, value, limit, False, failed[0].error)
    return GateResult(name, value, limit, True if enough else None, "" if enough else "too few requests")


def _golden(limit: float, stable: Measurements, candidate: Measurements) -> GateResult:
    """Compare the greedy texts; the worst prompt decides."""
    texts = {answer.prompt: answer.text for answer in stable.good}
    worst, why = -1.0, ""
    for answer in candidate.good:
        if answer.prompt not in texts:
            continue
        reference = texts[answer.prompt]
        distance = edit_distance(reference, answer.text) / max(len(reference), len(answer.text), 1)
        if not answer.text.strip() and reference.strip():
            distance = 1.0
        if distance > worst:
            worst, why = distance, f"{answer.prompt[:40]!r} became {answer.text[:60]!r}, was {reference[:60]!r}"
    if worst < 0:
        return GateResult("golden_distance", None, limit, None, "no prompt was answered by both versions")
    return GateResult("golden_distance", round(worst, 4), limit, worst <= limit, why if worst > limit else "")


def _speed(gates: Gates, stable: Measurements, candidate: Measurements, enough: bool) -> list[GateResult]:
    old_ttft, new_ttft = (percentile([a.ttft_s for a in each.good], 0.95) for each in (stable, candidate))
    old_tps, new_tps = (percentile([a.tokens_per_second for a in each.good], 0.5) for each in (stable, candidate))
    results = []
    if old_ttft is None or new_ttft is None or not enough:
        results.append(GateResult(TTFT, None, gates.max_ttft_ratio, None, "too few answers"))
    else:
        ratio = new_ttft / old_ttft
        passed = ratio <= gates.max_ttft_ratio or new_ttft - old_ttft <= gates.ttft_slack_s
        why = f"{new_ttft:.3f} s, stable {old_ttft:.3f} s"
        results.append(GateResult(TTFT, round(ratio, 3), gates.max_ttft_ratio, passed, why))
    limit = gates.min_tokens_per_second_ratio
    if old_tps is None or new_tps is None or not enough:
        results.append(GateResult(TOKENS_PER_SECOND, None, limit, None, "too few answers"))
    else:
        why = f"{new_tps:.1f} tokens/s, stable {old_tps:.1f}"
        results.append(
            GateResult(TOKENS_PER_SECOND, round(new_tps / old_tps, 3), limit, new_tps >= limit * old_tps, why)
        )
    return results


def evaluate_query(query: Query, value: float | None, requests: float | None, least_requests: int) -> GateResult:
    """Check the value of one Prometheus query."""
    limit = query.max if query.max is not None else query.min if query.min is not None else math.nan
    if value is None or math.isnan(value):
        return GateResult(query.name, None, limit, None, "Prometheus has no data")
    if query.requests_query and (requests is None or requests < least_requests):
        return GateResult(query.name, value, limit, None, f"only {requests or 0:g} of {least_requests} requests")
    passed = (query.max is None or value <= query.max) and (query.min is None or value >= query.min)
    return GateResult(query.name, value, limit, passed)


def format_result(result: GateResult) -> str:
    """Return the line that shows one result."""
    word = {True: "passed", False: "FAILED", None: "no data"}[result.passed]
    value = "-" if result.value is None else f"{result.value:g}"
    text = f"{result.name} {value} (limit {result.limit:g}) {word}"
    return f"{text}: {result.why}" if result.why else text


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the value that this share of the values does not exceed; None without values."""
    known = sorted(value for value in values if not math.isnan(value))
    return known[min(math.ceil(share * len(known)), len(known)) - 1] if known else None


def edit_distance(left: str, right: str) -> int:
    """Return how many characters must be inserted, deleted or replaced (Levenshtein)."""
    previous = list(range(len(right) + 1))
    for row, one in enumerate(left, 1):
        current = [row]
        for column, other in enumerate(right, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (one != other)))
        previous = current
    return previous[-1]
