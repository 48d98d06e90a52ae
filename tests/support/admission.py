"""Validates rendered objects as a cluster does: by Kubernetes' schemas and Kubernetes', KServe's and Knative's rules.

Rules without a schema are implemented here. Their sources: Kubernetes' validation of labels, annotations and pods
(pkg/apis/core/validation); KServe 0.20's webhooks (pkg/apis/serving/v1beta1); Knative Serving 1.23's validation
(pkg/apis/serving/k8s_validation.go, fieldmask.go).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes.client.models
import kubernetes_validate
import yaml
from kubernetes.utils.quantity import parse_quantity

from charts.render_manifests import Object
from tests.support.structural_schema import violations

KSERVE = yaml.safe_load((Path(__file__).parent / "kserve_schema.yaml").read_text())
KUBERNETES = "1.33"
NAME = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
SUBDOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
POD_FIELDS = set(kubernetes.client.models.V1PodSpec.attribute_map.values())
KNATIVE_VOLUMES = {"name", "emptyDir", "secret", "configMap", "projected"}


def objections(objects: list[Object]) -> list[str]:
    """Return the errors with which a cluster would refuse the objects."""
    found = [f"{kind}/{name} twice" for (kind, name), n in Counter(map(_key, objects)).items() if n > 1]
    return found + [f"{o['kind']}: {words}" for o in objects for words in _object_objections(o)]


def _key(o: Object) -> tuple[str, str]:
    return o["kind"], o["metadata"]["name"]


def _object_objections(o: Object) -> Iterator[str]:
    metadata = o["metadata"]
    if not re.fullmatch(SUBDOMAIN, str(metadata["name"])):
        yield f"name {metadata['name']!r}"
    yield from _label_objections(metadata.get("labels", {}))
    yield from (f"annotation {key!r}" for key in metadata.get("annotations", {}) if not _is_key(key))
    if o["kind"] in KSERVE:
        yield from violations(o, KSERVE[o["kind"]])
    elif not o["apiVersion"].startswith("monitoring.coreos.com/"):
        try:
            kubernetes_validate.validate(o, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{error.path}: {error.message}"
    if o["kind"] == "InferenceService":
        knative = metadata["annotations"]["serving.kserve.io/deploymentMode"] == "Knative"
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", metadata["name"]):
            yield "not an InferenceService's name"
        for predictor in [o["spec"]["predictor"], *(canary["predictor"] for canary in o["spec"].get("canary", []))]:
            yield from _label_objections(predictor.get("labels", {}))
            yield from _pod_objections({k: v for k, v in predictor.items() if k in POD_FIELDS}, knative)
    if o["kind"] == "Job":
        yield from _pod_objections(o["spec"]["template"]["spec"], knative=False)


def _pod_objections(spec: Object, knative: bool) -> Iterator[str]:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
    try:
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{error.path}: {error.message}"
    yield from _label_objections(spec.get("nodeSelector", {}))
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    for container in spec["containers"]:
        yield from _container_objections(container)
        mounted = [mount["name"] for mount in container.get("volumeMounts", [])]
        yield from (f"{name} is mounted and no volume" for name in mounted if name not in volumes)
        if knative:
            yield from (f"volume {name} is not mounted" for name in volumes if name not in mounted)
    yield from (f"volume {name} twice" for name, n in Counter(volumes).items() if n > 1)
    if knative:
        yield from (f"volume {v['name']}" for v in spec["volumes"] if not v.keys() <= KNATIVE_VOLUMES)
    for toleration in spec.get("tolerations", []):
        exists = toleration.get("operator", "Equal") == "Exists"
        if (exists and toleration.get("value")) or not (exists or toleration.get("key")):
            yield f"toleration {toleration}"


def _container_objections(container: Object) -> Iterator[str]:
    resources = container["resources"]
    for half in ("requests", "limits"):
        yield from (f"no {half}.{key}" for key in ("cpu", "memory") if key not in resources[half])
        yield from (f"{half}.{key} is 0" for key, quantity in resources[half].items() if parse_quantity(quantity) <= 0)
    for key, request in resources["requests"].items():
        if key in resources["limits"] and parse_quantity(request) > parse_quantity(resources["limits"][key]):
            yield f"requests.{key} is above its limit"
    names = Counter(variable["name"] for variable in container.get("env", []))
    yield from (f"env {name} twice" for name, n in names.items() if n > 1)
    paths = Counter(mount["mountPath"].rstrip("/") for mount in container.get("volumeMounts", []))
    yield from (f"mount {path!r}" for path, n in paths.items() if n > 1 or path in ("", "/dev", "/dev/log"))
    if container.get("livenessProbe", {}).get("successThreshold", 1) != 1:
        yield "liveness successThreshold"
    host = r"[A-Za-z0-9.-]+(:[0-9]+)?"
    part = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
    if not re.fullmatch(rf"({host}/)?{part}(/{part})*(:\w[\w.-]*)?(@sha256:[0-9a-f]{{64}})?", container["image"], re.A):
        yield f"image {container['image']!r}"


def _label_objections(labels: dict[str, Any]) -> Iterator[str]:
    for key, value in labels.items():
        if not _is_key(key) or not isinstance(value, str) or not re.fullmatch(f"({NAME})?", value):
            yield f"label {key!r}: {value!r}"


def _is_key(key: str) -> bool:
    return re.fullmatch(f"({SUBDOMAIN}/)?{NAME}", key) is not None
