"""KServe's controller in Standard mode: Deployments, `spec.canary[]` and HTTPRoute weights; `tick` runs it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from .api import Object, Store
from .knative import TICK_S, Image
from .kserve import NAME, NAMESPACE, PODS, SERVICE, inference_service

DEPLOYMENTS = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments"
ROUTE = f"/apis/gateway.networking.k8s.io/v1/namespaces/{NAMESPACE}/httproutes/{NAME}"


@dataclass
class StandardWorld:
    """The cluster; with `gateway_api=False`, KServe creates an Ingress and does not split traffic."""

    store: Store
    images: dict[str, Image] = field(default_factory=dict)
    gateway_api: bool = True
    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    weights: dict[str, int] = field(default_factory=dict)
    """Of the HTTPRoute."""
    shares: list[dict[str, int]] = field(default_factory=list)
    starts: Counter[str] = field(default_factory=Counter)
    ages: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    """Deployments without a ready pod that the HTTPRoute gave requests, once for each tick."""
    removed_with_traffic: list[str] = field(default_factory=list)
    """Deployments deleted while the HTTPRoute gave them traffic: a slow gateway still sends requests there."""

    def install(self, image: str, **predictor: Any) -> StandardWorld:
        service = inference_service(image, **predictor)
        storage = {"name": "STORAGE_URI", "value": "hf://mistralai/Mistral-7B-Instruct-v0.3"}
        service["spec"]["predictor"]["containers"][0]["env"].append(storage)
        service["metadata"]["annotations"] = {"serving.kserve.io/deploymentMode": "Standard"}
        self.store.put(SERVICE, service)
        for _ in range(6):
            self.tick()
        return self

    def tick(self) -> None:
        with self.store.lock:
            self.now += timedelta(seconds=TICK_S)
            service = self.store.objects[SERVICE]
            predictor, canaries = service["spec"]["predictor"], service["spec"].get("canary") or []
            wanted = {self._name(predictor): predictor["containers"]}
            for canary in canaries:
                wanted[self._name(canary["predictor"])] = canary["predictor"]["containers"]
            assert "name" not in predictor, "KServe's webhook denies another name without another storage URI"
            self._deployments(wanted)
            ready = {name: self._is_ready(name) for name in wanted}
            service["status"] = {
                "url": f"http://{NAME}-{NAMESPACE}.example.com",
                "deploymentMode": "Standard",
                "canaryStatuses": [
                    {"name": c["predictor"]["name"], "ready": ready[self._name(c["predictor"])]} for c in canaries
                ],
            }
            self.store.put(SERVICE, service)
            self._route(self._name(predictor), canaries, ready)

    def images_by_name(self) -> dict[str, str]:
        return {
            d["metadata"]["name"]: d["spec"]["template"]["spec"]["containers"][0]["image"]
            for d in self.store.under(DEPLOYMENTS)
        }

    def _name(self, predictor: Object) -> str:
        return f"{NAME}-{predictor['name']}-predictor" if predictor.get("name") else f"{NAME}-predictor"

    def _deployments(self, wanted: dict[str, Any]) -> None:
        for deployment in self.store.under(DEPLOYMENTS):
            if deployment["metadata"]["name"] not in wanted:  # an orphan
                name = deployment["metadata"]["name"]
                del self.store.objects[f"{DEPLOYMENTS}/{name}"]
                if self.weights.get(name):
                    self.removed_with_traffic.append(name)
        for name, containers in wanted.items():
            if self.images_by_name().get(name) != containers[0]["image"]:
                self.ages[name] = 0
                self.starts[name] += 1
            self.ages[name] += 1
            image = self.images.get(containers[0]["image"], Image())
            ready = self.ages[name] > image.load_ticks and not (image.crashes or image.hangs or image.pull_error)
            labels = {"serving.kserve.io/inferenceservice": NAME, "app": f"isvc.{name}"}
            deployment = {
                "metadata": {"labels": labels},
                "spec": {"template": {"spec": {"containers": containers}}},
                "status": {
                    "replicas": 1,  # with the chart's maxSurge of 0, the old pod ends before the new one starts
                    "updatedReplicas": 1,
                    "availableReplicas": int(ready),
                },
            }
            stored = self.store.put(f"{DEPLOYMENTS}/{name}", deployment)
            stored["status"]["observedGeneration"] = stored["metadata"]["generation"]
            status: Object = {"name": "kserve-container", "restartCount": 0, "ready": ready, "state": {"running": {}}}
            if image.crashes:
                status |= {"restartCount": self.ages[name], "state": {"waiting": {"reason": "CrashLoopBackOff"}}}
            condition = {"type": "Ready", "status": str(ready)}
            pod = {"conditions": [condition], "containerStatuses": [status]}
            containers_of_pod = {"containers": [{"name": "kserve-container"}]}
            self.store.put(
                f"{PODS}/{name}-x", {"metadata": {"labels": labels}, "spec": containers_of_pod, "status": pod}
            )
        for pod in self.store.under(PODS):
            if pod["metadata"]["name"].removesuffix("-x") not in wanted:
                del self.store.objects[f"{PODS}/{pod['metadata']['name']}"]

    def _is_ready(self, name: str) -> bool:
        return bool(self.store.objects[f"{DEPLOYMENTS}/{name}"]["status"]["availableReplicas"])

    def _route(self, stable: str, canaries: list[Object], ready: dict[str, bool]) -> None:
        weights = {
            self._name(canary["predictor"]): canary["trafficPercent"]
            for canary in canaries
            if ready[self._name(canary["predictor"])]
        }
        weights = {stable: 100 - sum(weights.values()), **weights}
        if not self.gateway_api:
            weights = {stable: 100}
        else:
            backends = [{"name": name, "weight": weight} for name, weight in weights.items()]
            self.store.put(ROUTE, {"spec": {"rules": [{"backendRefs": backends}]}})
        self.weights = weights
        self.lost += [name for name, weight in weights.items() if weight and self.ages and not self._is_ready(name)]
        images = self.images_by_name()
        self.shares.append({images[name]: weight for name, weight in weights.items() if weight})
