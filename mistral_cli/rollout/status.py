"""Where a release stands: objects in, one phase and one sentence out. Nothing here reads or waits."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from . import faults, knative, standard
from .observed import STANDARD, Object, Observed, condition, dig, time_of
from .versions import Version, Versions


class Phase(StrEnum):
    """One word for a release."""

    STABLE = "Stable"
    """One version has all requests, and nothing else is asked for."""
    PENDING = "Pending"
    """The new version does not exist yet, or has no pod."""
    SCHEDULING = "Scheduling"
    PULLING = "Pulling"
    DOWNLOADING = "Downloading"
    LOADING = "Loading"
    READY = "Ready"
    """The new version is ready and gets no requests."""
    SETTLING = "Settling"
    """The traffic does not yet follow the spec."""
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
    """How long the new version's pod has found no node."""
    awake: frozenset[str] = frozenset()
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
    """Return the status; `changed` is when the spec was last patched, so that older events say nothing."""
    found = versions_of(observed)
    awake = frozenset(
        version.name
        for version in found.all
        if any(condition(pod, "Ready").get("status") == "True" for pod in pods_of(observed, version))
    )
    deadline_s = seconds(str(dig(observed.predictor, "annotations", knative.PROGRESS_DEADLINE) or "600s"))

    def status(phase: Phase, message: str, scheduling_s: float = 0.0) -> Status:
        return Status(phase, message, found, observed.mode, observed.generation, deadline_s, scheduling_s, awake)

    if not _followed(found) and (refusal := faults.of_update(observed.service, observed.events, changed)):
        return status(Phase.FAILED, refusal)
    if not found.created:
        return status(Phase.PENDING, f"no version with the image {found.wished_image} yet")
    newest = found.candidate or found.stable
    assert newest is not None
    if not newest.ready:
        pods = pods_of(observed, newest)
        if fault := faults.of_version(newest.source, pods, observed.events):
            return status(Phase.FAILED, fault)
        return status(*_starting(observed, newest, pods))
    if newest.name not in awake and (pods := pods_of(observed, newest)):  # ready once, and starting again
        if fault := faults.of_version(newest.source, pods, observed.events):
            return status(Phase.FAILED, fault)
        starting, waits_for, _ = _starting(observed, newest, pods)
        return status(_traffic_phase(found, newest), f"{newest.name} is {starting.lower()}: {waits_for}")
    phase = _traffic_phase(found, newest)
    sentences = {
        Phase.SETTLING: f"{newest.name} is to get {_wished(found)} %",
        Phase.STABLE: f"{newest.name} runs {newest.image}",
        Phase.READY: f"{newest.name} is ready and gets no requests",
        Phase.SPLIT: f"{newest.name} gets {newest.share} %",
    }
    return status(phase, sentences[phase])


def _traffic_phase(found: Versions, newest: Version) -> Phase:
    if not _followed(found):
        return Phase.SETTLING
    if found.candidate is None:
        return Phase.STABLE
    return Phase.SPLIT if newest.share else Phase.READY


def _wished(found: Versions) -> int:
    return 100 if found.wished_share is None else found.wished_share


def _followed(found: Versions) -> bool:
    """Tell whether the traffic is what the spec asks for, as far as the newest version goes."""
    newest = found.candidate or found.stable
    if newest is None or not found.created:
        return False
    if found.candidate is None:  # one version: whatever the percent, both parts go to it
        return newest.share == 100
    return newest.routed and newest.share == _wished(found) and sum(found.shares.values()) == 100


def _starting(observed: Observed, version: Version, pods: Sequence[Object]) -> tuple[Phase, str, float]:
    if not pods:
        said = condition(version.source, "Ready").get("message") or "its controller has not made one"
        return Phase.PENDING, f"{version.name} has no pod yet: {said}", 0.0
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
        said = json.loads(last)
        return str(said["message"]) if isinstance(said, dict) else last
    except (ValueError, KeyError):
        return last


def seconds(duration: str) -> float:
    """Read a duration as Go writes it: 1800s, 30m, 1h30m, 500ms."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    parts = re.findall(r"([\d.]+)(h|ms|m|s)", duration)
    if not parts or "".join(map("".join, parts)) != duration:
        raise ValueError(f"{duration!r} is not a duration such as 90s, 30m or 1h30m.")
    return sum(float(number) * units[unit] for number, unit in parts)
