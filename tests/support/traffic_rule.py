"""Computes how KServe and Knative split the traffic of an InferenceService.

It imitates KServe v0.20 (`createKnativeService` in `reconcilers/knative/ksvc_reconciler.go`, `PropagateStatus` in
`inference_service_status.go`) and Knative's Configuration: a changed template creates a new revision, and
`latestRevision: true` resolves to the latest ready revision.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

NOT_IN_THE_TEMPLATE = ("canaryTrafficPercent",)


@dataclass
class Knative:
    """The revisions of one Knative Service and their readiness."""

    name: str
    templates: list[Any] = field(default_factory=list)
    ready: set[str] = field(default_factory=set)

    def revision(self, number: int) -> str:
        return f"{self.name}-{number:05d}"

    @property
    def created(self) -> str:
        return self.revision(len(self.templates))

    @property
    def latest_ready(self) -> str:
        numbers = [n for n in range(1, len(self.templates) + 1) if self.revision(n) in self.ready]
        return self.revision(numbers[-1]) if numbers else ""

    def image(self, revision: str) -> str:
        return self.templates[int(revision.rsplit("-", 1)[1]) - 1]["containers"][0]["image"]


def reconcile(service: dict[str, Any], knative: Knative) -> None:
    """Create a revision if the template has changed, and update the status until it is stable."""
    predictor = service["spec"]["predictor"]
    template = {key: copy.deepcopy(value) for key, value in predictor.items() if key not in NOT_IN_THE_TEMPLATE}
    if not knative.templates or knative.templates[-1] != template:
        knative.templates.append(template)
    status = service.setdefault("status", {}).setdefault("components", {}).setdefault("predictor", {})
    before = None
    while before != status:
        before = copy.deepcopy(status)
        status["latestCreatedRevision"] = knative.created
        status["latestReadyRevision"] = knative.latest_ready
        status["traffic"] = _traffic(predictor.get("canaryTrafficPercent"), status, knative)
        _roll_out(status)


def _traffic(percent: int | None, status: dict[str, Any], knative: Knative) -> list[dict[str, Any]]:
    if not knative.latest_ready:
        return []
    rolled_out = status.get("latestRolledoutRevision", "")
    if percent is None or not rolled_out:
        percent = 100
    traffic = [{"revisionName": knative.latest_ready, "latestRevision": True, "percent": percent, "tag": "latest"}]
    if percent < 100:
        old = {"revisionName": rolled_out, "latestRevision": False, "percent": 100 - percent, "tag": "prev"}
        traffic.append(old)
    return traffic


def _roll_out(status: dict[str, Any]) -> None:
    ready, rolled_out = status["latestReadyRevision"], status.get("latestRolledoutRevision", "")
    for target in [target for target in status["traffic"] if target["latestRevision"]]:
        if rolled_out != ready:
            if target["percent"] == 100:
                status["previousRolledoutRevision"] = rolled_out
                status["latestRolledoutRevision"] = ready
        elif ready == status["latestCreatedRevision"] and target["percent"] < 100:
            on_it = sum(t["percent"] for t in status["traffic"] if t["revisionName"] == ready)
            if on_it == 100 and status.get("previousRolledoutRevision"):
                status["latestRolledoutRevision"] = status["previousRolledoutRevision"]
