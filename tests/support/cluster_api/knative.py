"""Knative's controllers, on top of KServe's, for one InferenceService; `tick` runs them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from .api import Object
from .kserve import NAME, NAMESPACE, PODS, SERVICE, KServe, inference_service

TICK_S = 2
REVISIONS = f"/apis/serving.knative.dev/v1/namespaces/{NAMESPACE}/revisions"
QUOTAS = f"/api/v1/namespaces/{NAMESPACE}/resourcequotas"
LONGEST_LAG = 2
"""The most ticks in a row in which a controller does not run."""
IDLE_TICKS = 4
"""The stable window."""


@dataclass
class Image:
    """The behaviour of an image's server."""

    load_ticks: int = 2
    crashes: bool = False
    pull_error: str = ""
    hangs: bool = False
    """Whether it never answers its probe."""


@dataclass
class World(KServe):
    """The cluster: a tick runs every controller once. An image that is not in `images` works."""

    images: dict[str, Image] = field(default_factory=dict)
    gpus: int = 3
    seed: int | None = None
    """The seed for running random controllers in each tick; None runs all of them, in order."""
    shares: list[dict[str, int]] = field(default_factory=list)
    """The percentage of user traffic by image, at each tick."""
    ages: Counter[str] = field(default_factory=Counter)
    idle: Counter[str] = field(default_factory=Counter)
    ever_ready: set[str] = field(default_factory=set)
    skipped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed) if self.seed is not None else None

    def install(self, image: str, **predictor: Any) -> World:
        """Apply an InferenceService and wait until its first revision has all the traffic."""
        self.store.put(SERVICE, inference_service(image, **predictor))
        if self.quota is not None:
            self.store.put(f"{QUOTAS}/pods", {"spec": {"hard": {"pods": str(self.quota)}}})
        for _ in range(200):
            self.tick()
            if self.component.get("latestRolledoutRevision"):
                return self
        raise AssertionError("the first revision never became ready")

    def tick(self) -> None:
        """Run every controller once."""
        with self.store.lock:
            self.now += timedelta(seconds=TICK_S)
            for controller in (self._kserve, self._configuration, self._revisions, self._route, self._kserve_status):
                self.skipped[controller.__name__] += 1
                if self._dice is None or self._dice.random() < 0.7 or self.skipped[controller.__name__] > LONGEST_LAG:
                    self.skipped[controller.__name__] = 0
                    controller()
            self._quota_status()
            images = self.images_by_revision()
            self.shares.append(dict(Counter({images.get(t["revisionName"], "?"): 0 for t in self.route})))
            for target in self.route:
                self.shares[-1][images.get(target["revisionName"], "?")] += target["percent"]

    def images_by_revision(self) -> dict[str, str]:
        return {r["metadata"]["name"]: r["spec"]["containers"][0]["image"] for r in self.store.under(REVISIONS)}

    def _configuration(self) -> None:
        if not self.ksvc:
            return
        name = f"{NAME}-predictor-{self.ksvc['generation']:05d}"
        path = f"{REVISIONS}/{name}"
        if path not in self.store.objects:  # Knative recreates the newest revision after its deletion
            self.ages[name] = 0
            self.ever_ready.discard(name)
            self.store.put(
                path,
                {
                    "metadata": {
                        "labels": {
                            "serving.kserve.io/inferenceservice": NAME,
                            "serving.knative.dev/configurationGeneration": str(self.ksvc["generation"]),
                        },
                        "annotations": dict(self.ksvc["template"]["annotations"]),
                        "creationTimestamp": self._stamp(),
                    },
                    "spec": {"containers": self.ksvc["template"]["containers"]},
                    "status": {"conditions": [{"type": "Ready", "status": "Unknown", "reason": "Deploying"}]},
                },
            )
        self.ksvc["created"] = name
        ready = [r["metadata"]["name"] for r in self.store.under(REVISIONS) if _is_ready(r)]
        if ready:
            self.ksvc["ready"] = max(ready, key=lambda each: int(each.rpartition("-")[2]))

    def _revisions(self) -> None:
        names = {revision["metadata"]["name"] for revision in self.store.under(REVISIONS)}
        for pod in self.store.under(PODS):
            if pod["metadata"]["labels"]["serving.knative.dev/revision"] not in names:
                del self.store.objects[f"{PODS}/{pod['metadata']['name']}"]
        routed = {target["revisionName"] for target in self.route}
        for revision in self.store.under(REVISIONS):
            name = revision["metadata"]["name"]
            starts_at_zero = revision["metadata"]["annotations"].get("autoscaling.knative.dev/initial-scale") == "0"
            if starts_at_zero and not _is_ready(revision):
                self._mark(revision, "True", "")
                self.ever_ready.add(name)
            waiting = name not in self.ever_ready
            self.idle[name] = 0 if name in routed or waiting else self.idle[name] + 1
            window = revision["metadata"]["annotations"].get("autoscaling.knative.dev/window")
            if self.idle[name] >= (1 if window == "6s" else IDLE_TICKS):
                self.store.objects.pop(f"{PODS}/{name}-pod", None)
                self.ages[name] = 0
            elif waiting or (name in routed and (not starts_at_zero or self._has_traffic(name))):
                self._run_pod(revision)

    def _has_traffic(self, name: str) -> bool:
        return any(target["revisionName"] == name and target["percent"] for target in self.route)

    def _run_pod(self, revision: Object) -> None:
        name = revision["metadata"]["name"]
        image = self.images.get(revision["spec"]["containers"][0]["image"], Image())
        path = f"{PODS}/{name}-pod"
        pod = self.store.objects.get(path)
        if pod is None and self.quota is not None and len(self.store.under(PODS)) >= self.quota:
            self._event("ReplicaSet", f"{name}-deployment-1", "FailedCreate", "pods is forbidden: exceeded quota: pods")
            return
        placed = [p["metadata"]["name"] for p in self.store.under(PODS) if p["status"].get("placed")]
        age = self.ages[name]
        status: Object = {"placed": True, "phase": "Pending", "containerStatuses": []}
        container: Object = {"name": "kserve-container", "restartCount": 0, "ready": False, "state": {}}
        if f"{name}-pod" not in placed and len(placed) >= self.gpus:
            status = {"phase": "Pending", "conditions": [_unschedulable(self._stamp(), pod)]}
            self._put_pod(path, name, status)
            self._mark(revision, "False", "Unschedulable") if name not in self.ever_ready else None
            return
        self.ages[name] += 1
        if image.pull_error:
            container["state"] = {"waiting": {"reason": "ErrImagePull", "message": image.pull_error}}
        elif image.crashes:
            container["restartCount"] = age
            container["state"] = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}
            ended = {"exitCode": 1, "reason": "Error", "message": "ValueError: bad weights"}
            container["lastState"] = {"terminated": ended}
        else:
            container["state"] = {"running": {}}
            status["phase"] = "Running"
            if age >= image.load_ticks and not image.hangs:
                container["ready"] = True
                status["conditions"] = [{"type": "Ready", "status": "True"}]
                self.ever_ready.add(name)
                self._mark(revision, "True", "")
        status["containerStatuses"] = [container]
        self._put_pod(path, name, status)

    def _put_pod(self, path: str, revision: str, status: Object) -> None:
        labels = {"serving.kserve.io/inferenceservice": NAME, "serving.knative.dev/revision": revision}
        spec = {"containers": [{"name": "kserve-container"}], "nodeName": "gpu-1" if status.get("placed") else None}
        self.store.put(path, {"metadata": {"labels": labels}, "spec": spec, "status": status})

    def _mark(self, revision: Object, status: str, reason: str) -> None:
        revision["status"]["conditions"] = [{"type": "Ready", "status": status, "reason": reason, "message": ""}]

    def _route(self) -> None:
        names = {revision["metadata"]["name"] for revision in self.store.under(REVISIONS)}
        targets = []
        for target in self.ksvc.get("traffic", ()):
            name = self.ksvc.get("ready") if target.get("latest") else target["revisionName"]
            if name not in names:
                return  # RevisionMissing: the route stays as it was
            targets.append({**target, "revisionName": name})
        self.route = targets

    def _quota_status(self) -> None:
        if (quota := self.store.objects.get(f"{QUOTAS}/pods")) is not None:
            used = str(len(self.store.under(PODS)))
            quota["status"] = {"hard": quota["spec"]["hard"], "used": {"pods": used}}


def _is_ready(revision: Object) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in revision["status"]["conditions"])


def _unschedulable(stamp: str, pod: Object | None) -> Object:
    for condition in (pod or {}).get("status", {}).get("conditions", ()):
        if condition["type"] == "PodScheduled":
            return dict(condition)
    message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    return {
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message,
        "lastTransitionTime": stamp,
    }  # fmt: skip
