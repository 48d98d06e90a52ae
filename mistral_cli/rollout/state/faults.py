"""Finds permanent faults. Each becomes one sentence, and the rollout is reverted at once.

A fault that may pass (no free GPU while an autoscaler adds a node, a registry that timed out) is left to the
deadline.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from mistral_cli.objects import Object, condition, dig, time_of

PERMANENT_REASONS = frozenset(
    {"InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
)
PULL_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff"})
PULL_REFUSALS = (
    "not found", "unauthorized", "denied", "forbidden", "manifest unknown", "no match for platform",
    "insufficient_scope", "no such host", "does not exist",
)  # fmt: skip
"""Parts of a runtime's message that another attempt would repeat."""
RESTARTS_THAT_PROVE_A_CRASH_LOOP = 2
RESTARTS_OF_A_DOWNLOAD = 4
"""A download may fail a few times because of the network."""
TRANSIENT_REASONS = frozenset(
    {"Deploying", "Unschedulable", "NoTraffic", "Queued", "ContainerCreating", "PodInitializing"}
)
"""Reasons of a revision that is False or Unknown and may still become ready."""
REFUSED_PODS = ("exceeded quota", "not found", "does not support storageUri", "is forbidden", "admission webhook")
REFUSED_UPDATES = ("exceeded quota", "denied the request", "admission webhook", "is invalid")


def of_version(version: Object, pods: Sequence[Object], events: Sequence[Object]) -> str | None:
    """Return why this revision or Deployment cannot become ready, or None if it still may."""
    return next(
        (fault for pod in pods for fault in _pod(pod, events)), None
    ) or _revision(version) or _deployment(version) or refused_pod(version, events)  # fmt: skip


def of_update(service: Object, events: Sequence[Object], since: datetime | None) -> str | None:
    """Return why KServe cannot apply the spec, from the events of the InferenceService.

    An exhausted quota is the usual cause: KServe and Knative try the pod before every update, so that without
    room for one more pod even a change of the traffic is refused.
    """
    name = service["metadata"]["name"]
    for event in events:
        if dig(event, "involvedObject", "name") != name or dig(event, "involvedObject", "kind") != "InferenceService":
            continue
        message = str(event.get("message", ""))
        if (
            event.get("type") == "Warning"
            and _is_new(event, since)
            and any(part in message for part in REFUSED_UPDATES)
        ):
            return f"KServe cannot apply the change: {_short(message)}"
    return None


def _pod(pod: Object, events: Sequence[Object]) -> Iterable[str]:
    name = pod["metadata"]["name"]
    yield from _missing_volume(pod, events)
    for init in dig(pod, "status", "initContainerStatuses") or ():
        yield from _container(name, init, RESTARTS_OF_A_DOWNLOAD, events)
    for container in dig(pod, "status", "containerStatuses") or ():
        if container.get("name") != "queue-proxy":
            yield from _container(name, container, RESTARTS_THAT_PROVE_A_CRASH_LOOP, events)


def _missing_volume(pod: Object, events: Sequence[Object]) -> Iterable[str]:
    """Return the event of a pod whose containers wait for a Secret or a ConfigMap that does not exist."""
    name = pod["metadata"]["name"]
    statuses = [*(dig(pod, "status", "initContainerStatuses") or ()), *(dig(pod, "status", "containerStatuses") or ())]
    if any(dig(status, "state", "waiting") is None for status in statuses):
        return
    for event in events:
        message = str(event.get("message", "")).strip()
        if (
            event.get("reason") == "FailedMount"
            and dig(event, "involvedObject", "name") == name
            and message.endswith("not found")
            and any(f'{kind} "' in message for kind in ("secret", "configmap"))
        ):
            yield f"{name}: {_short(message)}"


def _container(pod: str, status: Object, restarts: int, events: Sequence[Object]) -> Iterable[str]:
    waiting = dig(status, "state", "waiting") or {}
    reason, message = str(waiting.get("reason", "")), str(waiting.get("message", ""))
    if reason in PERMANENT_REASONS:
        yield f"{pod}: {reason}: {_short(message)}"
    if reason in PULL_REASONS:
        messages = [message, *(str(e.get("message", "")) for e in events if dig(e, "involvedObject", "name") == pod)]
        for sentence in messages:
            if "pull" in sentence.lower() and any(part in sentence for part in PULL_REFUSALS):
                yield f"{pod}: the image cannot be pulled: {_short(sentence)}"
    if status.get("restartCount", 0) >= restarts and not status.get("ready"):
        ended = dig(status, "lastState", "terminated") or dig(status, "state", "terminated") or {}
        last_line = str(ended.get("message", "")).strip().rpartition("\n")[2]
        cause = ended.get("reason") or "Error"
        yield (
            f"{pod}: {status.get('name')} ended {status['restartCount']} times, last with "
            f"exit code {ended.get('exitCode', '?')} ({cause}){': ' + _short(last_line) if last_line else ''}"
        )


def _revision(revision: Object) -> str | None:
    ready = condition(revision, "Ready")
    if ready.get("status") != "False" or ready.get("reason") in TRANSIENT_REASONS:
        return None
    if str(ready.get("reason", "")).startswith("ExitCode"):
        return None  # one crash is no loop: the restarts of the pod decide
    if ready.get("reason") in PULL_REASONS:
        return None  # the pod's message decides
    return f"{revision['metadata']['name']}: {ready.get('reason')}: {_short(str(ready.get('message', '')))}"


def _deployment(deployment: Object) -> str | None:
    progressing = condition(deployment, "Progressing")
    if progressing.get("status") == "False" and progressing.get("reason") == "ProgressDeadlineExceeded":
        return f"{deployment['metadata']['name']}: ProgressDeadlineExceeded: {_short(str(progressing.get('message')))}"
    return None


def refused_pod(version: Object, events: Sequence[Object]) -> str | None:
    """Return the event of a ReplicaSet whose last pod was refused: a missing Secret, a quota, a storage container."""
    created = time_of(dig(version, "metadata", "creationTimestamp"))
    mine = [
        event
        for event in events
        if str(dig(event, "involvedObject", "name") or "").startswith(f"{version['metadata']['name']}-")
        and _is_new(event, created)
    ]
    successes = [_seen(event) for event in mine if event.get("reason") == "SuccessfulCreate"]
    for event in mine:
        message = str(event.get("message", ""))
        if event.get("reason") == "FailedCreate" and any(part in message for part in REFUSED_PODS):
            seen = _seen(event)
            if not any(seen is not None and success is not None and success >= seen for success in successes):
                return f"{dig(event, 'involvedObject', 'name')}: no pod can be created: {_short(message)}"
    return None


def _is_new(event: Object, since: datetime | None) -> bool:
    seen = _seen(event)
    return since is None or seen is None or seen >= since.replace(microsecond=0)


def _seen(event: Object) -> datetime | None:
    """Return the time of an event's last occurrence."""
    return time_of(dig(event, "series", "lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime"))


def _short(message: str) -> str:
    message = " ".join(message.split())
    return message if len(message) <= 400 else f"{message[:397]}..."
