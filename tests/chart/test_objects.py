"""Every object of every scenario through the official typed clients and Kubernetes' own schemas.

A field that a client does not know is lost on the way through it: what comes out must be what went in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import kserve.models
import kubernetes.client.models
import kubernetes_validate
import pytest
from kubernetes.client import ApiClient

from charts.render_manifests import MANIFESTS, Object, load, render
from tests.support.admission import objections
from tests.support.helm import SCENARIOS, predictor

TYPES = {
    "InferenceService": "V1beta1InferenceService",
    "ClusterStorageContainer": "V1alpha1ClusterStorageContainer",
    "ServiceAccount": "V1ServiceAccount",
    "PersistentVolumeClaim": "V1PersistentVolumeClaim",
    "Job": "V1Job",
    "Deployment": "V1Deployment",
    "Service": "V1Service",
    "NetworkPolicy": "V1NetworkPolicy",
    "ConfigMap": "V1ConfigMap",
    "Secret": "V1Secret",
    "Namespace": "V1Namespace",
    "Pod": "V1Pod",
}
UNTYPED = {"PodMonitor", "PrometheusRule"}
"""Prometheus' operator has no Python client: see test_chart_monitoring.py."""
RENAMED = {"K8sIoApiAppsV1DeploymentStrategy": "V1DeploymentStrategy"}
"""What KServe's models call by its full Go name."""
KUBERNETES = "1.33"


def typed(value: Any, kind: str) -> Any:
    """Return the model of a wire value, as the API client makes it; KServe's models have no `from_dict`."""
    if match := re.fullmatch(r"list\[(.*)\]", kind):
        return [typed(item, match[1]) for item in value]
    model = getattr(kserve.models, kind, None)
    if model is None:
        native = getattr(kubernetes.client.models, RENAMED.get(kind, kind), None)
        return native.from_dict(value) if native else value
    names = {wire: name for name, wire in model.attribute_map.items()}
    known = {names[wire]: part for wire, part in value.items() if wire in names}
    return model(**{name: typed(part, model.openapi_types[name]) for name, part in known.items()})


def wire(value: Any) -> Any:
    """Return what a client would send."""
    if isinstance(value, list):
        return [wire(item) for item in value]
    if not type(value).__module__.startswith("kserve."):
        return ApiClient().sanitize_for_serialization(value)
    fields = ((name, getattr(value, attribute)) for attribute, name in value.attribute_map.items())
    return {name: wire(part) for name, part in fields if part is not None}


def through_the_client(o: Object) -> Any:
    return wire(typed(o, TYPES[o["kind"]]))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_object_survives_its_typed_client(scenario: str) -> None:
    for (kind, name), o in load(render(scenario)).items():
        if kind not in UNTYPED:
            assert through_the_client(o) == o, name


def test_a_misspelt_field_would_be_noticed() -> None:
    [service] = [o for (kind, _), o in load(render()).items() if kind == "InferenceService"]
    service["spec"]["predictor"]["containerConcurency"] = 1
    assert through_the_client(service) != service


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_object_of_kubernetes_meets_its_schema(scenario: str) -> None:
    for (kind, _), o in load(render(scenario)).items():
        if kind not in UNTYPED and o["apiVersion"].split("/")[0] != "serving.kserve.io":
            kubernetes_validate.validate(o, KUBERNETES, strict=True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_pod_in_the_inference_service_meets_kubernetes_schema(scenario: str) -> None:
    fields = kubernetes.client.models.V1PodSpec.attribute_map.values()
    spec = {key: value for key, value in predictor(scenario=scenario).items() if key in fields}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", sorted((MANIFESTS / "cluster").glob("*.yaml")), ids=lambda p: p.stem)
def test_what_the_cluster_gets_survives_its_typed_client(path: Any) -> None:
    for o in load(path.read_text()).values():
        assert through_the_client(o) == o
        kubernetes_validate.validate(o, KUBERNETES, strict=True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_cluster_has_no_objection_to_a_scenario(scenario: str) -> None:
    assert not objections(list(load(render(scenario)).values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda predictor: predictor["containers"][0]["resources"]["limits"].pop("cpu"), "no limits.cpu"),
        (lambda predictor: predictor["containers"][0]["env"].append({"name": "STORAGE_URI"}), "duplicate entries"),
        (lambda predictor: predictor["volumes"].append({"name": "a", "hostPath": {"path": "/"}}), "is not mounted"),
        (lambda predictor: predictor["nodeSelector"].update({"zone": "x" * 64}), "label 'zone'"),
        (lambda predictor: predictor["tolerations"].append({"value": "a"}), "toleration"),
        (lambda predictor: predictor.update({"scaleMetric": "qps"}), "must be one of"),
    ],
)
def test_what_a_cluster_refuses_would_be_noticed(change: Callable[[Object], Any], words: str) -> None:
    [service] = [o for (kind, _), o in load(render()).items() if kind == "InferenceService"]
    change(service["spec"]["predictor"])
    assert words in " ".join(objections([service]))
