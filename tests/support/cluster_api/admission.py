"""The answers of a cluster's webhooks to a dry run, and a cluster that lacks nothing for a release with a GPU.

The rules are KServe 0.20's defaults (`inference_service_defaults.go`) and Knative 1.21's validation of a dry run
(`k8s_validation.go`, `fieldmask.go`, `podspec_dryrun.go`). The error messages are those of a real cluster.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from .api import Object, Refusal, Store

NAMESPACE = "mistral"
NODE = "/api/v1/nodes/gpu-1"
QUOTA = f"/api/v1/namespaces/{NAMESPACE}/resourcequotas/gpus"
SECRET = f"/api/v1/namespaces/{NAMESPACE}/secrets/hf-token"
SERVICE = f"/apis/serving.kserve.io/v1beta1/namespaces/{NAMESPACE}/inferenceservices/mistral-7b"
CONFIGS = "/api/v1/namespaces/knative-serving/configmaps"
DEFINITION = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/inferenceservices.serving.kserve.io"
STORAGE_CONTAINERS = "/apis/serving.kserve.io/v1alpha1/clusterstoragecontainers"
CLASS = "/apis/storage.k8s.io/v1/storageclasses/shared"
PROMETHEUS = "/apis/monitoring.coreos.com/v1/namespaces/monitoring/prometheuses/kube"
DENIED = 'admission webhook "validation.webhook.serving.knative.dev" denied the request: validation failed: '
FLAGS = {"nodeSelector": "nodeselector", "tolerations": "tolerations", "priorityClassName": "priorityclassname"}
FIELDS = (
    "annotations", "automountServiceAccountToken", "containerConcurrency", "containers", "deploymentStrategy",
    "enableServiceLinks", "maxReplicas", "minReplicas", "nodeSelector", "scaleMetric", "scaleTarget",
    "serviceAccountName", "storageContainerName", "terminationGracePeriodSeconds", "timeout", "tolerations", "volumes",
)  # fmt: skip


@dataclass
class AdmittingStore(Store):
    """A store that passes dry runs through the webhooks."""

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        if query.get("dryRun") and method in ("POST", "PUT"):
            if f"/api/v1/namespaces/{body['metadata']['namespace']}" not in self.objects:
                raise Refusal(404, f'namespaces "{body["metadata"]["namespace"]}" not found')
            if body["kind"] == "InferenceService":
                return self._complete(super().answer(method, path, query, body))
            if body["kind"] == "Service":
                self._validate(body)
        return super().answer(method, path, query, body)

    def _complete(self, service: Object) -> Object:
        fields = self.objects[DEFINITION]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
        known = fields["properties"]["predictor"]["properties"]
        unknown = [f'unknown field "spec.predictor.{key}"' for key in service["spec"]["predictor"] if key not in known]
        if unknown:
            raise Refusal(
                400, f"InferenceService in version v1beta1 cannot be handled: strict decoding error: {unknown[0]}"
            )
        service = copy.deepcopy(service)
        for container in service["spec"]["predictor"]["containers"]:
            for side in ("requests", "limits"):
                resources = container.setdefault("resources", {}).setdefault(side, {})
                container["resources"][side] = {"cpu": "1", "memory": "2Gi", **resources}
        return service

    def _validate(self, service: Object) -> None:
        spec = service["spec"]["template"]["spec"]
        features = self.objects[f"{CONFIGS}/config-features"]["data"]
        limit = int(self.objects[f"{CONFIGS}/config-defaults"]["data"].get("max-revision-timeout-seconds", 600))
        if spec.get("timeoutSeconds", 0) > limit:
            path = "spec.template.spec.timeoutSeconds"
            raise Refusal(400, f"{DENIED}expected 0 <= {spec['timeoutSeconds']} <= {limit}: {path}")
        off = [field for field, flag in FLAGS.items() if field in spec
               and features.get(f"kubernetes.podspec-{flag}") != "enabled"]  # fmt: skip
        if off:
            fields = ", ".join(f"spec.template.spec.{field}" for field in off)
            raise Refusal(400, f"{DENIED}must not set the field(s): {fields}")
        for container in spec["containers"]:
            resources = container["resources"]
            for key, request in resources["requests"].items():
                if key in resources["limits"] and parse_quantity(request) > parse_quantity(resources["limits"][key]):
                    said = f'Invalid value: "{request}": must be less than or equal to {key} limit of '
                    raise Refusal(400, f"{DENIED}dry run failed with {said}{resources['limits'][key]}")


def cluster_that_lacks_nothing() -> AdmittingStore:
    """Return a cluster that meets all requirements of the `gfd` scenario with a PodMonitor."""
    store = AdmittingStore()
    store.objects["/version"] = {"gitVersion": "v1.34.4"}
    for version, kinds in {
        "serving.kserve.io/v1beta1": ["InferenceService"],
        "serving.kserve.io/v1alpha1": ["ClusterStorageContainer"],
        "serving.knative.dev/v1": ["Service"],
        "monitoring.coreos.com/v1": ["PodMonitor"],
    }.items():
        store.objects[f"/apis/{version}"] = {"resources": [{"kind": kind} for kind in kinds]}
    predictor = {"properties": {field: {} for field in FIELDS}}
    schema = {"openAPIV3Schema": {"properties": {"spec": {"properties": {"predictor": predictor}}}}}
    store.put(DEFINITION, {"spec": {"versions": [{"name": "v1beta1", "served": True, "schema": schema}]}})
    store.put(f"/api/v1/namespaces/{NAMESPACE}", {"metadata": {"labels": {"kubernetes.io/metadata.name": NAMESPACE}}})
    flags = {f"kubernetes.podspec-{flag}": "enabled" for flag in ("nodeselector", "tolerations")}
    for name, data in {"config-features": flags, "config-defaults": {}, "config-autoscaler": {},
                       "config-deployment": {}, "config-domain": {}}.items():  # fmt: skip
        labels = {"app.kubernetes.io/version": "1.21.1"}
        store.put(f"{CONFIGS}/{name}", {"metadata": {"labels": labels}, "data": data})
    store.put(SECRET, {"data": {"HF_TOKEN": "dG9rZW4="}})
    store.put(NODE, node())
    store.put(CLASS, storage_class("efs.csi.aws.com"))
    store.put(PROMETHEUS, {"spec": {"podMonitorSelector": {}, "podMonitorNamespaceSelector": {}}})
    store.put(SERVICE, {"spec": {"predictor": {}}, "status": {"url": "http://localhost"}})
    return store


def node(labels: Mapping[str, str] | None = None, **allocatable: str) -> Object:
    """Return a node with two A10Gs and the labels of NVIDIA's operator."""
    own = {
        "nvidia.com/gpu.product": "NVIDIA-A10G",
        "nvidia.com/cuda.driver-version.major": "580",
        "kubernetes.io/arch": "amd64",
    }
    room = {"cpu": "16", "memory": "64Gi", "ephemeral-storage": "200Gi", "nvidia.com/gpu": "2", **allocatable}
    taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    return {
        "metadata": {"labels": {**own, **(labels or {})}},
        "spec": {"taints": [taint]},
        "status": {"allocatable": {key: value for key, value in room.items() if value != "0"}, "images": []},
    }


def gpu_pod(namespace: str = "other") -> Object:
    """Return a pod that uses one GPU of the node."""
    container = {"resources": {"requests": {"nvidia.com/gpu": "1"}}}
    return {
        "metadata": {"namespace": namespace},
        "spec": {"nodeName": "gpu-1", "containers": [container]},
        "status": {"phase": "Running"},
    }


def quota(**hard: str) -> Object:
    return {"status": {"hard": hard, "used": dict.fromkeys(hard, "0")}}


def storage_class(provisioner: str) -> Object:
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"}
    return {"metadata": {"annotations": annotations}, "provisioner": provisioner}
