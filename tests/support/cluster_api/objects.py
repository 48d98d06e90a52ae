"""Builders of objects as a cluster returns them: Kubernetes 1.34, KServe 0.20, Knative 1.23."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from mistral_cli.rollout.state.observed import Observed

Object = dict[str, Any]
NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
OLD, NEW = "registry.example.com/mistral@sha256:" + "1" * 64, "registry.example.com/mistral@sha256:" + "2" * 64
R1, R2, R3 = (f"mistral-7b-predictor-0000{number}" for number in (1, 2, 3))


def stamp(seconds_ago: float = 0) -> str:
    return (NOW - timedelta(seconds=seconds_ago)).strftime("%Y-%m-%dT%H:%M:%SZ")


def service(
    image: str = NEW, percent: int | None = 0, created: str = R2, ready: str = R1, rolled_out: str = R1,
    traffic: dict[str, int] | None = None, observed_generation: int = 1, **metadata: Any,
) -> Object:  # fmt: skip
    """Return an InferenceService during a canary rollout."""
    predictor: Object = {"containers": [{"name": "kserve-container", "image": image}]}
    if percent is not None:
        predictor["canaryTrafficPercent"] = percent
    shares = {R1: 100} if traffic is None else traffic
    return {
        "metadata": {"name": "mistral-7b", "namespace": "mistral", "generation": 7, "resourceVersion": "1", **metadata},
        "spec": {"predictor": predictor},
        "status": {
            "url": "http://mistral-7b-predictor.mistral.example.com",
            "observedGeneration": observed_generation,
            "conditions": [{"type": "Ready", "status": "True"}],
            "components": {
                "predictor": {
                    "latestCreatedRevision": created,
                    "latestReadyRevision": ready,
                    "latestRolledoutRevision": rolled_out,
                    "traffic": [{"revisionName": name, "percent": share} for name, share in shares.items()],
                }
            },
        },
    }


def revision(name: str, image: str, status: str = "True", reason: str = "", message: str = "") -> Object:
    condition = {"type": "Ready", "status": status, "reason": reason, "message": message}
    return {
        "metadata": {
            "name": name,
            "labels": {"serving.knative.dev/configurationGeneration": str(int(name[-5:]))},
            "annotations": {},
            "creationTimestamp": stamp(300),
        },
        "spec": {"containers": [{"name": "kserve-container", "image": image}]},
        "status": {"conditions": [condition]},
    }


def pod(
    owner: str, *, scheduled_ago: float | None = None, inits: Any = (), containers: Any = (), ready: bool = False
) -> Object:
    """Return a pod of a revision; `scheduled_ago` is the time since it first found no node."""
    conditions = [{"type": "Ready", "status": str(ready)}]
    if scheduled_ago is not None:
        message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
        conditions.append(
            {"type": "PodScheduled", "status": "False", "message": message, "lastTransitionTime": stamp(scheduled_ago)}
        )
    return {
        "metadata": {"name": f"{owner}-deployment-6b-x", "labels": {"serving.knative.dev/revision": owner}},
        "spec": {"containers": [{"name": "kserve-container"}, {"name": "queue-proxy"}]},
        "status": {
            "conditions": conditions,
            "initContainerStatuses": list(inits),
            "containerStatuses": list(containers),
        },
    }


def container(
    name: str = "kserve-container", *, restarts: int = 0, ended: Object | None = None, **state: Any
) -> Object:
    """Return a container's status; `state` is running, waiting or terminated."""
    return {
        "name": name,
        "ready": False,
        "restartCount": restarts,
        "state": state,
        "lastState": {"terminated": ended} if ended else {},
    }


def event(kind: str, name: str, reason: str, message: str, seconds_ago: float = 0) -> Object:
    return {
        "involvedObject": {"kind": kind, "name": name},
        "type": "Warning",
        "reason": reason,
        "message": message,
        "lastTimestamp": stamp(seconds_ago),
    }


def observed(svc: Object | None = None, **more: Any) -> Observed:
    """Return the observed state: by default, R1 serves and R2 is the newest revision."""
    more.setdefault("revisions", [revision(R1, OLD), revision(R2, NEW, "Unknown", "Deploying")])
    return Observed(service=svc or service(), now=NOW, **more)
