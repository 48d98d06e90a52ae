"""Measures the versions of a status and checks the gates."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mistral_cli.exit_codes import Failure
from mistral_cli.rollout.gates.measure import Endpoint, Meter, endpoint
from mistral_cli.rollout.gates.rules import (
    SPEED_GATES,
    Answer,
    GateResult,
    Gates,
    Measurements,
    evaluate,
    evaluate_query,
)  # fmt: skip
from mistral_cli.rollout.state.status import Status
from mistral_cli.rollout.state.versions import Version

Baseline = dict[str, Any]
"""Measurements of a stable version that runs no longer, as they are kept in the record."""


@dataclass(frozen=True)
class Addresses:
    """Where requests go if the cluster's own hosts do not resolve on this machine."""

    entry: str = ""
    """The gateway; the `Host` header selects the service."""
    host: str = ""
    """The users' host, if it is not the one in the status."""
    stable: str = ""
    candidate: str = ""
    """Addresses of the two versions, if the ingress gives them none."""


@dataclass
class GateEvaluator:
    """Measures once for each step, and keeps the results until the slower gates have data too."""

    gates: Gates
    meter: Meter
    addresses: Addresses
    namespace: str
    name: str
    clock: Callable[[], float] = time.monotonic
    _passed: dict[int, list[GateResult]] = field(default_factory=dict)
    _begun_s: dict[int, float] = field(default_factory=dict)
    _slow: Counter[int] = field(default_factory=Counter)
    """How often each step's candidate was too slow."""

    def baseline(self, status: Status) -> Baseline:
        """Measure the stable version alone."""
        _, figures = self.meter.compare(None, self._users(status))
        if not figures.good:
            raise Failure(f"The stable version does not answer: {figures.answers[0].error}")
        return {
            "texts": {answer.prompt: answer.text for answer in figures.good},
            "ttft_s": [round(answer.ttft_s, 4) for answer in figures.good],
            "tokens_per_second": [
                round(a.tokens_per_second, 2) for a in figures.good if not math.isnan(a.tokens_per_second)
            ],
        }

    def evaluate(self, status: Status, share: int, baseline: Baseline | None) -> list[GateResult]:
        """Measure, unless this step's requests have already passed, and query Prometheus."""
        self._begun_s.setdefault(share, self.clock())
        if share not in self._passed:
            found = self._confirmed(share, evaluate(self.gates, *self._figures(status, baseline)))
            if not all(result.passed for result in found):
                return found
            self._passed[share] = found
        return [*self._passed[share], *self._queries(status), *self._hold(share)]

    def wake(self, status: Status) -> None:
        """Send the request that starts a pod. Its failure shows in the status."""
        try:
            self.meter.wake(self._users(status))
        except Failure:
            return

    def _confirmed(self, share: int, found: list[GateResult]) -> list[GateResult]:
        """Return the results, with a failed speed gate as one without data until enough measurements failed."""
        if not any(result.passed is False and result.name in SPEED_GATES for result in found):
            return found
        self._slow[share] += 1
        if self._slow[share] >= self.gates.speed_measurements:
            return found
        count = f"{self._slow[share]} of {self.gates.speed_measurements} measurements too slow"
        return [
            replace(result, passed=None, why=f"{count}: {result.why}")
            if result.passed is False and result.name in SPEED_GATES
            else result
            for result in found
        ]

    def _figures(self, status: Status, baseline: Baseline | None) -> tuple[Measurements, Measurements]:
        if baseline is None:
            return self.meter.compare(
                self._version(status.stable, "stable"), self._version(status.candidate, "candidate")
            )
        _, candidate = self.meter.compare(None, self._users(status))
        return _restored(baseline), candidate

    def _users(self, status: Status) -> Endpoint:
        return endpoint(status.versions.url, self.addresses.entry, self.addresses.host)

    def _version(self, version: Version | None, role: str) -> Endpoint:
        if given := getattr(self.addresses, role):
            return endpoint(given)
        if version is None or not version.url:
            raise Failure(f"The {role} version has no address of its own.")
        return endpoint(version.url, self.addresses.entry)

    def _queries(self, status: Status) -> list[GateResult]:
        newest = status.candidate or status.stable
        names = {"namespace": self.namespace, "name": self.name, "revision": newest.name if newest else ""}
        found = []
        for query in self.gates.queries:
            value, requests = (
                self.meter.query(_filled(text, names)) if text else None for text in (query.query, query.requests_query)
            )
            found.append(evaluate_query(query, value, requests, self.gates.requests))
        return found

    def _hold(self, share: int) -> list[GateResult]:
        held_s = self.clock() - self._begun_s[share]
        if not self.gates.hold_s:
            return []
        return [
            GateResult("hold_s", round(held_s, 1), self.gates.hold_s, True if held_s >= self.gates.hold_s else None)
        ]


def _filled(text: str, names: dict[str, str]) -> str:
    for name, value in names.items():  # not `format`: PromQL has braces of its own
        text = text.replace(f"{{{name}}}", value)
    return text


def _restored(baseline: Baseline) -> Measurements:
    texts = [Answer(prompt, text) for prompt, text in baseline["texts"].items()]
    ttft = [Answer("", ttft_s=seconds) for seconds in baseline["ttft_s"]]
    speed = [Answer("", tokens_per_second=rate) for rate in baseline["tokens_per_second"]]
    return Measurements((*texts, *ttft, *speed))
