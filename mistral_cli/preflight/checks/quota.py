"""Checks the namespace's quotas: room for the pod and for the dry run before every update."""

from __future__ import annotations

import json
from collections.abc import Iterable

from mistral_cli.objects import dig, quantity
from mistral_cli.preflight.checks.finding import Finding, missing, ok, unknown
from mistral_cli.preflight.observed import Observed
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import Target
from mistral_cli.rollout.planning.capacity import demand

NAME = "ResourceQuota"
PODS, PODS_OF_A_ROLLOUT = 2, 3


def check(release: Release, observed: Observed, target: Target) -> Iterable[Finding]:
    """Yield a finding for each quota that is short, or one that says that none is."""
    if observed.quotas.unknown:
        yield unknown(NAME, observed.quotas.unknown, target.rights())
        return
    quotas = observed.quotas.value or ()
    canary = release.predictor.get("canaryTrafficPercent") is not None
    needed = PODS_OF_A_ROLLOUT if canary else PODS
    taken = demand(release.predictor)
    own = _own_pods(release, observed, target)
    enough, tight = True, False
    for each in quotas:
        hard, used = dig(each, "status", "hard") or {}, dig(each, "status", "used") or {}
        room = {
            key: (quantity(limit) - quantity(used.get(key, "0"))) / taken[key] + own
            for key, limit in hard.items()
            if taken.get(key)
        }
        short = {key for key, pods in room.items() if pods < needed}
        tight = tight or any(pods < PODS_OF_A_ROLLOUT for pods in room.values())
        if short:
            enough = False
            wanted = {
                key: f"{quantity(used.get(key, '0')) + (PODS_OF_A_ROLLOUT - own) * taken[key]:f}"
                for key in sorted(short)
            }
            patch = json.dumps({"spec": {"hard": wanted}})
            quota = str(each["metadata"]["name"])
            command = target.namespaced("patch", "resourcequota", quota, "--type", "merge", "-p", patch)
            yield missing(NAME, f"{quota} is short of {', '.join(sorted(short))}: {_reason(needed)}.", command)
    if enough:
        message = "room for what the release asks" if quotas else "none"
        message += "; a rollout beside the old revision needs room for one more pod" if tight else ""
        yield ok(NAME, message)


def _reason(needed: int) -> str:
    return (
        f"room for {needed} pods is needed, because KServe tries one before every update "
        f"and refuses even a change of the traffic without it"
    )


def _own_pods(release: Release, observed: Observed, target: Target) -> int:
    """Return how many pods of the release are counted in the quota already."""
    return sum(
        release.owns(pod, target.namespace) and dig(pod, "status", "phase") not in ("Succeeded", "Failed")
        for pod in observed.pods.value or ()
    )
