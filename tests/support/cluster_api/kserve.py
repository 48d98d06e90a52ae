"""KServe's controllers over a store: make a Knative Service from an InferenceService and copy its status back."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from .api import Object, Store

NAMESPACE, NAME = "mistral", "mistral-7b"
SERVICE = f"/apis/serving.kserve.io/v1beta1/namespaces/{NAMESPACE}/inferenceservices/{NAME}"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
EVENTS = f"/api/v1/namespaces/{NAMESPACE}/events"
DOMAIN = "example.com"


@dataclass
class KServe:
    """The state that KServe reads and writes; the Knative Service is a dict."""

    store: Store
    quota: int | None = None
    """The most pods of the namespace; None is no limit."""
    initial_scale_zero: bool = True
    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    ksvc: dict[str, Any] = field(default_factory=dict)
    route: list[dict[str, Any]] = field(default_factory=list)
    component: dict[str, Any] = field(default_factory=dict)

    def _kserve(self) -> None:
        service = self.store.objects[SERVICE]
        predictor = service["spec"]["predictor"]
        annotations = dict(predictor.get("annotations") or {})
        if annotations.get("autoscaling.knative.dev/initial-scale") == "0" and not self.initial_scale_zero:
            del annotations["autoscaling.knative.dev/initial-scale"]  # KServe drops it silently
        template = {"containers": predictor["containers"], "annotations": annotations}
        percent, rolled_out = predictor.get("canaryTrafficPercent"), self.component.get("latestRolledoutRevision")
        traffic: list[dict[str, Any]] = [{"latest": True, "percent": 100, "tag": "latest"}]
        if percent is not None and rolled_out:
            traffic[0]["percent"] = percent
            if percent < 100:
                traffic.append({"revisionName": rolled_out, "percent": 100 - percent, "tag": "prev"})
        wanted = {"template": template, "traffic": traffic}
        if wanted == {key: self.ksvc.get(key) for key in wanted}:
            return
        if self.ksvc and self.quota is not None and len(self.store.under(PODS)) + 1 > self.quota:
            self._event(
                "InferenceService", NAME, "InternalError",
                'fails to reconcile predictor: admission webhook "validation.webhook.serving.knative.dev" denied the '
                'request: dry run failed with pods is forbidden: exceeded quota: pods',
            )  # fmt: skip
            return
        generation = self.ksvc.get("generation", 0) + (self.ksvc.get("template") != template)
        self.ksvc = {**wanted, "generation": generation}

    def _kserve_status(self) -> None:
        """Imitate `PropagateStatus`: a revision is rolled out once it has 100 percent of the traffic."""
        component, ready, created = self.component, self.ksvc.get("ready"), self.ksvc.get("created")
        if not created:
            return
        component["latestCreatedRevision"] = created
        total: Counter[str] = Counter()
        for target in self.route:
            total[target["revisionName"]] += target["percent"]
        for target in self.route:
            if target["revisionName"] != ready or not target.get("latest"):
                continue
            if component.get("latestRolledoutRevision") != ready:
                if target["percent"] == 100:
                    component["previousRolledoutRevision"] = component.get("latestRolledoutRevision", "")
                    component["latestRolledoutRevision"] = ready
            elif ready == created and target["percent"] < 100 and total[ready] == 100:
                component["latestRolledoutRevision"] = component.get("previousRolledoutRevision") or ready
        component["latestReadyRevision"] = ready or ""
        component["traffic"] = [
            {
                "revisionName": target["revisionName"],
                "percent": target["percent"],
                "latestRevision": bool(target.get("latest")),
                "tag": target["tag"],
                "url": f"http://{target['tag']}-{NAME}-predictor.{NAMESPACE}.{DOMAIN}",
            }
            for target in self.route
        ]
        service = self.store.objects[SERVICE]
        service["status"] = {
            "url": f"http://{NAME}-predictor.{NAMESPACE}.{DOMAIN}",
            "components": {"predictor": dict(component)},
            "observedGeneration": self.ksvc["generation"],
            "conditions": [{"type": "Ready", "status": "True" if self.route else "False"}],
        }
        self.store.put(SERVICE, service)

    def _event(self, kind: str, name: str, reason: str, message: str) -> None:
        self.store.put(
            f"{EVENTS}/{name}.{reason}",
            {
                "involvedObject": {"kind": kind, "name": name},
                "type": "Warning",
                "reason": reason,
                "message": message,
                "lastTimestamp": self._stamp(),
            },
        )

    def _stamp(self) -> str:
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")


def inference_service(image: str, **predictor: Any) -> Object:
    """Return the InferenceService as the chart renders it."""
    gpu = {"cpu": "1", "memory": "4Gi", "nvidia.com/gpu": "1"}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": NAME,
            "namespace": NAMESPACE,
            "annotations": {
                "serving.kserve.io/deploymentMode": "Knative",
                "serving.kserve.io/enable-tag-routing": "true",
            },
        },
        "spec": {
            "predictor": {
                "minReplicas": 1,
                "annotations": {"serving.knative.dev/progress-deadline": "600s"},
                "containers": [
                    {
                        "name": "kserve-container",
                        "image": image,
                        "env": [{"name": "MISTRAL_DTYPE", "value": "auto"}],
                        "resources": {"requests": gpu, "limits": gpu},
                    }
                ],
                **predictor,
            }
        },
    }
