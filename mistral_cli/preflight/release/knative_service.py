"""The Knative Service that KServe makes of an InferenceService, and the pod, for their dry runs.

Follows KServe 0.20 (`ksvc_reconciler.go`, `predictor.go`) as far as a webhook can object to it: the pod spec, the
scaling annotations, the timeouts. The traffic is left out: a new service has one target.
"""

from __future__ import annotations

import copy
from typing import Any

from mistral_cli.objects import Object

COMPONENT_FIELDS = frozenset(
    {
        "annotations", "autoScaling", "batcher", "canaryTrafficPercent", "containerConcurrency", "deploymentStrategy",
        "labels", "logger", "maxReplicas", "minReplicas", "model", "name", "scaleMetric", "scaleMetricType",
        "scaleTarget", "storageContainerName", "storageUris", "timeout", "workerSpec",
    }
)  # fmt: skip
"""Fields of a predictor that are KServe's own; every other one is the pod's."""
NOT_COPIED = frozenset(
    {
        "autoscaling.knative.dev/min-scale", "autoscaling.knative.dev/max-scale",
        "internal.serving.kserve.io/storage-initializer-sourceuri",
        "kubectl.kubernetes.io/last-applied-configuration",
    }
)  # fmt: skip
ON_THE_SERVICE = "serving.knative.dev/rollout-duration"
DRY_RUN = "features.knative.dev/podspec-dryrun"
"""Knative before 1.21 tries the pod only where this annotation asks for it; later ones do on every dry run."""
AUTOSCALING = "autoscaling.knative.dev"


def knative_service(service: Object, namespace: str, *, with_account: bool) -> dict[str, Any]:
    """Return the Knative Service; `with_account=False` leaves out a ServiceAccount that is not there yet."""
    predictor = service["spec"]["predictor"]
    name = f"{service['metadata']['name']}-predictor"
    annotations = {
        key: value
        for key, value in {**_metadata(service, "annotations"), **(predictor.get("annotations") or {})}.items()
        if key not in NOT_COPIED
    }
    annotations.setdefault(f"{AUTOSCALING}/class", f"kpa.{AUTOSCALING}")
    annotations[f"{AUTOSCALING}/min-scale"] = str(predictor.get("minReplicas", 1))
    for field, key in (("maxReplicas", "max-scale"), ("scaleTarget", "target"), ("scaleMetric", "metric")):
        if predictor.get(field):
            annotations[f"{AUTOSCALING}/{key}"] = str(predictor[field])
    own = {DRY_RUN: "enabled"}
    if ON_THE_SERVICE in annotations:
        own[ON_THE_SERVICE] = annotations.pop(ON_THE_SERVICE)
    spec: dict[str, Any] = pod_spec(service, with_account=with_account)
    if predictor.get("timeout") is not None:
        spec["timeoutSeconds"] = spec["responseStartTimeoutSeconds"] = predictor["timeout"]
    if predictor.get("containerConcurrency") is not None:
        spec["containerConcurrency"] = predictor["containerConcurrency"]
    labels = _labels(service)
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace, "labels": labels, "annotations": own},
        "spec": {"template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}},
    }


def pod(service: Object, namespace: str, *, with_account: bool) -> dict[str, Any]:
    """Return the pod of Standard mode."""
    metadata = {
        "name": f"{service['metadata']['name']}-predictor-preflight",
        "namespace": namespace,
        "labels": _labels(service),
    }
    spec = pod_spec(service, with_account=with_account)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def pod_spec(service: Object, *, with_account: bool) -> dict[str, Any]:
    """Return the pod's part of the predictor."""
    predictor = copy.deepcopy(dict(service["spec"]["predictor"]))
    spec = {key: value for key, value in predictor.items() if key not in COMPONENT_FIELDS}
    if not with_account:
        spec.pop("serviceAccountName", None)
    for container in spec["containers"]:
        variable = {"name": "INFERENCE_SERVICE_NAME", "value": service["metadata"]["name"]}
        container["env"] = [*(container.get("env") or ()), variable]
    return spec


def _labels(service: Object) -> dict[str, str]:
    return {
        **_metadata(service, "labels"),
        **(service["spec"]["predictor"].get("labels") or {}),
        "component": "predictor",
        "serving.kserve.io/inferenceservice": service["metadata"]["name"],
    }


def _metadata(service: Object, field: str) -> dict[str, str]:
    return dict(service["metadata"].get(field) or {})
