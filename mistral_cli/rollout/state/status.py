"""Computes the status of a release from its objects: one phase and one sentence. Nothing here reads or waits."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from mistral_cli.objects import Object, condition, dig, time_of
from mistral_cli.rollout.state import faults, knative, standard
from mistral_cli.rollout.state.observed import STANDARD, Observed
from mistral_cli.rollout.state.versions import Version, Versions


class Phase(StrEnum):
    """The phase of a release."""

    STABLE = "Stable"
    """One version has all the traffic, as the spec asks."""
    PENDING = "Pending"
    """The new version does not exist yet, or has no pod."""
    SCHEDULING = "Scheduling"
    PULLING = "Pulling"
    DOWNLOADING = "Downloading"
    LOADING = "Loading"
    READY = "Ready"
    """The new version is ready and gets no traffic."""
    SETTLING = "Settling"
    """The traffic does not follow the spec yet."""
    SPLIT = "Split"
    FAILED = "Failed"
    """The new version cannot become ready, or the spec cannot be applied."""


@dataclass(frozen=True)
class Status:
    """The answer of `compute`."""

    phase: Phase
    message: str
    versions: Versions
    mode: str
    generation: int
    progress_deadline_s: float
    scheduling_s: float = 0.0
    """Seconds that the new version's pod has waited for a node."""
    running: frozenset[str] = frozenset()
    """Versions with a ready pod."""

    @property
    def stable(self) -> Version | None:
        return self.versions.stable

    @property
    def candidate(self) -> Version | None:
        return self.versions.candidate

    def describe(self) -> str:
        """Return the line that is shown whenever it changes."""
        shares = ", ".join(f"{name} {share} %" for name, share in sorted(self.versions.shares.items()))
        return f"{self.phase}: {self.message}" + (f" [{shares}]" if shares else "")


def versions_of(observed: Observed) -> Versions:
    """Read the versions in the service's mode."""
    return (standard if observed.mode == STANDARD else knative).versions(observed)


def pods_of(observed: Observed, version: Version) -> list[Object]:
    """Return the pods of one version that are not being deleted."""
    return [
        pod
        for pod in observed.pods
        if not dig(pod, "metadata", "deletionTimestamp")
        and (
            dig(pod, "metadata", "labels", knative.REVISION_LABEL) == version.name
            or dig(pod, "metadata", "labels", "app") == f"isvc.{version.name}"
        )
    ]


def compute(observed: Observed, changed: datetime | None = None) -> Status:
    """Return the status. Events older than the last change of the spec or the newest version do not count."""
    found = versions_of(observed)
    created = [time_of(dig(version.source, "metadata", "creationTimestamp")) for version in found.all[-1:]]
    changed = max(filter(None, (changed, _spec_written(observed.service), *created)), default=None)
    running = frozenset(
        version.name
        for version in found.all
        if any(condition(pod, "Ready").get("status") == "True" for pod in pods_of(observed, version))
    )
    deadline_s = seconds(str(dig(observed.predictor, "annotations", knative.PROGRESS_DEADLINE) or "600s"))

    def status(phase: Phase, message: str, scheduling_s: float = 0.0) -> Status:
        return Status(phase, message, found, observed.mode, observed.generation, deadline_s, scheduling_s, running)

    if not _traffic_follows_spec(found) and (refusal := faults.of_update(observed.service, observed.events, changed)):
        return status(Phase.FAILED, refusal)
    if not found.created:
        return status(Phase.PENDING, f"no version with the image {found.desired_image} yet")
    newest = found.candidate or found.stable
    assert newest is not None
    if found.stable is not None and found.stable.image == newest.image and not found.stable.ready:
        newest = found.stable  # it restarts with the canary's image
    if not newest.ready:
        pods = pods_of(observed, newest)
        if fault := faults.of_version(newest.source, pods, observed.events):
            return status(Phase.FAILED, fault)
        return status(*_starting(observed, newest, pods))
    if newest.name not in running and (pods := pods_of(observed, newest)):  # ready once, and starting again
        if fault := faults.of_version(newest.source, pods, observed.events):
            return status(Phase.FAILED, fault)
        starting, waits_for, _ = _starting(observed, newest, pods)
        return status(_traffic_phase(found, newest), f"{newest.name} is {starting.lower()}: {waits_for}")
    phase = _traffic_phase(found, newest)
    # No fault: the event may be older than its repair, and the next request tries again.
    if newest.name not in running and (refusal := faults.refused_pod(newest.source, observed.events)):
        return status(phase, f"{newest.name} has no pod: {refusal}")
    sentences = {
        Phase.SETTLING: f"{newest.name} will get {_desired_share(found)} %",
        Phase.STABLE: f"{newest.name} runs {newest.image}",
        Phase.READY: f"{newest.name} is ready and gets no requests",
        Phase.SPLIT: f"{newest.name} gets {newest.share} %",
    }
    return status(phase, sentences[phase])


def _spec_written(service: Object) -> datetime | None:
    """Return when the spec was last written, by `managedFields`; None where the API server does not say."""
    entries = dig(service, "metadata", "managedFields") or ()
    times = [time_of(entry.get("time")) for entry in entries if "f:spec" in (entry.get("fieldsV1") or ())]
    return max(filter(None, times), default=None)


def _traffic_phase(found: Versions, newest: Version) -> Phase:
    if not _traffic_follows_spec(found):
        return Phase.SETTLING
    if found.candidate is None:
        return Phase.STABLE
    return Phase.SPLIT if newest.share else Phase.READY


def _desired_share(found: Versions) -> int:
    return 100 if found.desired_share is None else found.desired_share


def _traffic_follows_spec(found: Versions) -> bool:
    """Return whether the newest version gets the traffic that the spec asks for."""
    newest = found.candidate or found.stable
    if newest is None or not found.created:
        return False
    if found.candidate is None:  # a single version gets everything, whatever the percent
        return newest.share == 100
    return newest.routed and newest.share == _desired_share(found) and sum(found.shares.values()) == 100


def _starting(observed: Observed, version: Version, pods: Sequence[Object]) -> tuple[Phase, str, float]:
    if not pods:
        cause = condition(version.source, "Ready").get("message") or "its controller has not created one"
        return Phase.PENDING, f"{version.name} has no pod yet: {cause}", 0.0
    pod = max(pods, key=lambda each: str(dig(each, "metadata", "creationTimestamp") or ""))
    name = pod["metadata"]["name"]
    scheduled = condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        began = time_of(scheduled.get("lastTransitionTime")) or observed.now
        waited_s = (observed.now - began).total_seconds()
        return Phase.SCHEDULING, f"{name} waits for a node: {scheduled.get('message', '')}", waited_s
    tail = _message(observed.log_tails.get(name, ""))
    for init in dig(pod, "status", "initContainerStatuses") or ():
        if dig(init, "state", "running") is not None:
            percent = re.findall(r"(\d{1,3})%", tail)
            far = f" ({percent[-1]} %)" if percent else ""
            return Phase.DOWNLOADING, f"{name} runs {init.get('name')}{far}", 0.0
    containers = [c for c in dig(pod, "status", "containerStatuses") or () if c.get("name") != "queue-proxy"]
    if any(dig(container, "state", "running") is not None for container in containers):
        return Phase.LOADING, f"{name} loads the model{': ' + tail[:160] if tail else ''}", 0.0
    waiting: Object = next((dig(c, "state", "waiting") for c in containers if dig(c, "state", "waiting")), {})
    return Phase.PULLING, f"{name}: {waiting.get('reason', 'the image is being pulled')}", 0.0


def _message(log: str) -> str:
    """Return the last line of a log; of a JSON line, its message."""
    last = log.strip().rpartition("\n")[2]
    try:
        fields = json.loads(last)
        return str(fields["message"]) if isinstance(fields, dict) else last
    except (ValueError, KeyError):
        return last


def seconds(duration: str) -> float:
    """Read a duration as Go writes it: 1800s, 30m, 1h30m, 500ms."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    parts = re.findall(r"([\d.]+)(h|ms|m|s)", duration)
    if not parts or "".join(map("".join, parts)) != duration:
        raise ValueError(f"{duration!r} is not a duration such as 90s, 30m or 1h30m.")
    return sum(float(number) * units[unit] for number, unit in parts)
