"""Knative mode: revisions, `canaryTrafficPercent`, and the merge patches that move them.

KServe's rule: with a percent the newest READY revision gets it and the rest goes to `latestRolledoutRevision`;
without one the newest ready revision gets everything. A revision becomes "rolled out" once it has 100 percent.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from mistral_cli.objects import condition, dig, image_of
from mistral_cli.rollout.state.observed import Observed
from mistral_cli.rollout.state.versions import Version, Versions

INITIAL_SCALE = "autoscaling.knative.dev/initial-scale"
WINDOW = "autoscaling.knative.dev/window"
PROGRESS_DEADLINE = "serving.knative.dev/progress-deadline"
TAG_ROUTING = "serving.kserve.io/enable-tag-routing"
REVISION_LABEL = "serving.knative.dev/revision"
GENERATION_LABEL = "serving.knative.dev/configurationGeneration"
SHORTEST_WINDOW = "6s"
"""Knative's minimum."""


def versions(observed: Observed) -> Versions:
    """Return what the status says about the revisions."""
    component = dig(observed.service, "status", "components", "predictor") or {}
    targets = component.get("traffic") or ()
    shares: Counter[str] = Counter()
    urls: dict[str, str] = {}
    for target in targets:
        name = target.get("revisionName", "")
        shares[name] += target.get("percent") or 0
        if target.get("url"):
            urls[name] = target["url"]
    revisions = sorted(observed.revisions, key=_generation)
    found = tuple(
        Version(
            name=revision["metadata"]["name"],
            image=image_of(revision["spec"]),
            ready=condition(revision, "Ready").get("status") == "True",
            share=shares[revision["metadata"]["name"]],
            routed=revision["metadata"]["name"] in shares,
            url=urls.get(revision["metadata"]["name"], ""),
            source=revision,
        )
        for revision in revisions
    )
    by_name = {version.name: version for version in found}
    newest = by_name.get(component.get("latestCreatedRevision", ""))
    stable = by_name.get(component.get("latestRolledoutRevision", ""))
    wished = image_of(observed.predictor)
    return Versions(
        stable=stable,
        candidate=newest if newest is not None and newest != stable else None,
        all=found,
        shares={name: share for name, share in shares.items() if share},
        desired_image=wished,
        desired_share=observed.predictor.get("canaryTrafficPercent"),
        created=newest is not None and newest.image == wished,
        url=str(dig(observed.service, "status", "url") or component.get("url") or ""),
    )


def _generation(revision: Any) -> int:
    return int(dig(revision, "metadata", "labels", GENERATION_LABEL) or 0)


def image_patch(observed: Observed, image: str, share: int | None, initial_scale: str | None) -> dict[str, Any]:
    """Return the one patch that brings a new revision and says what it gets: a list is replaced whole."""
    containers = [dict(container) for container in observed.predictor["containers"]]
    containers[0]["image"] = image
    predictor: dict[str, Any] = {"containers": containers, "canaryTrafficPercent": share}
    if initial_scale != dig(observed.predictor, "annotations", INITIAL_SCALE):
        predictor["annotations"] = {INITIAL_SCALE: initial_scale}
    return {"spec": {"predictor": predictor}}


def share_patch(share: int | None) -> dict[str, Any]:
    """Return the patch that changes the traffic and nothing else; None removes the field, which means all."""
    return {"spec": {"predictor": {"canaryTrafficPercent": share}}}


def window_patch() -> dict[str, Any]:
    """Return the patch of an old Revision that lets its pods go as soon as no request is left."""
    return {"metadata": {"annotations": {WINDOW: SHORTEST_WINDOW}}}
