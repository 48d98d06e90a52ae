"""Measures the versions that a status names, and judges them by the gates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..exit_codes import Failure
from .gates import Answer, Figures, Gates, Judgement, judge, judge_query
from .measure import Endpoint, Meter, endpoint
from .status import Status
from .versions import Version

Baseline = dict[str, Any]
"""Figures of a stable version that runs no longer, as they are kept in the record."""


@dataclass(frozen=True)
class Addresses:
    """Where requests go, as far as the cluster's own hosts do not resolve here."""

    entry: str = ""
    """The gateway; the `Host` header says which service is meant."""
    host: str = ""
    """The users' host, when it is not the one in the status."""
    stable: str = ""
    candidate: str = ""
    """Addresses of single versions, where the ingress gives them none."""


@dataclass
class GateJudge:
    """Keeps what was measured at a step until the slower gates have their data too."""

    gates: Gates
    meter: Meter
    addresses: Addresses
    namespace: str
    name: str
    clock: Callable[[], float] = time.monotonic
    _passed: dict[int, list[Judgement]] = field(default_factory=dict)
    _begun_s: dict[int, float] = field(default_factory=dict)

    def baseline(self, status: Status) -> Baseline:
        """Measure the stable version alone."""
        _, figures = self.meter.compare(None, self._users(status))
        if not figures.good:
            raise Failure(f"The stable version gives no answer: {figures.answers[0].error}")
        return {
            "texts": {answer.prompt: answer.text for answer in figures.good},
            "ttft_s": [round(answer.ttft_s, 4) for answer in figures.good],
            "tokens_per_second": [
                round(a.tokens_per_second, 2) for a in figures.good if not math.isnan(a.tokens_per_second)
            ],
        }

    def judge(self, status: Status, share: int, baseline: Baseline | None) -> list[Judgement]:
        """Measure, unless this step's answers have passed already, and ask Prometheus."""
        self._begun_s.setdefault(share, self.clock())
        if share not in self._passed:
            found = judge(self.gates, *self._figures(status, baseline))
            if not all(judgement.passed for judgement in found):
                return found
            self._passed[share] = found
        return [*self._passed[share], *self._queries(status), *self._hold(share)]

    def wake(self, status: Status) -> None:
        """Send the request that starts a pod; the status says how it went."""
        try:
            self.meter.wake(self._users(status))
        except Failure:
            return

    def _figures(self, status: Status, baseline: Baseline | None) -> tuple[Figures, Figures]:
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

    def _queries(self, status: Status) -> list[Judgement]:
        newest = status.candidate or status.stable
        names = {"namespace": self.namespace, "name": self.name, "revision": newest.name if newest else ""}
        found = []
        for query in self.gates.queries:
            value, requests = (
                self.meter.query(_filled(text, names)) if text else None for text in (query.query, query.requests_query)
            )
            found.append(judge_query(query, value, requests, self.gates.requests))
        return found

    def _hold(self, share: int) -> list[Judgement]:
        held_s = self.clock() - self._begun_s[share]
        if not self.gates.hold_s:
            return []
        return [Judgement("hold_s", round(held_s, 1), self.gates.hold_s, True if held_s >= self.gates.hold_s else None)]


def _filled(text: str, names: dict[str, str]) -> str:
    for name, value in names.items():  # not `format`: PromQL has braces of its own
        text = text.replace(f"{{{name}}}", value)
    return text


def _restored(baseline: Baseline) -> Figures:
    texts = [Answer(prompt, text) for prompt, text in baseline["texts"].items()]
    ttft = [Answer("", ttft_s=seconds) for seconds in baseline["ttft_s"]]
    speed = [Answer("", tokens_per_second=rate) for rate in baseline["tokens_per_second"]]
    return Figures((*texts, *ttft, *speed))
