"""Checks the nodes: the release's labels, tolerated taints, enough of every resource, a free GPU, its driver."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from decimal import Decimal

from ..rollout.planning.capacity import GPU_PREFIXES, NODES_THAT_GROW, quantity
from ..rollout.state.observed import dig
from .answer import Object, Seen
from .finding import Finding, missing, ok, unknown
from .release import Release
from .where import Where

LEAST_DRIVER = 580
"""Of the CUDA 13 that the image holds."""
DRIVER_LABELS = ("nvidia.com/cuda.driver-version.major", "nvidia.com/cuda.driver.major")
PRODUCT = "nvidia.com/gpu.product"
KNOWN_BEFORE_THE_NODE = (
    "karpenter.", "eks.amazonaws.com/", "k8s.amazonaws.com/", "cloud.google.com/", "kubernetes.azure.com/",
    "node.kubernetes.io/instance-type",
)  # fmt: skip
"""Labels by which an autoscaler makes a node that is not there yet."""
ASKED_OF_NODES = ("cpu", "memory", "ephemeral-storage")
SERVICE_LABEL = "serving.kserve.io/inferenceservice"
OPERATOR = ("helm", "upgrade", "--install", "gpu-operator", "nvidia/gpu-operator", "-n", "gpu-operator")


def check(release: Release, seen: Seen, where: Where) -> Iterable[Finding]:
    """Yield a finding for the nodes, and for a release with a GPU one for what is free and one for the driver."""
    if seen.nodes.unknown:
        yield unknown("Nodes", seen.nodes.unknown, where.cluster_rights())
        return
    nodes = seen.nodes.value or ()
    resource = gpu_resource(release)
    selected = [node for node in nodes if _has_labels(node, release)]
    if not selected:
        yield _none_selected(release, nodes, resource, where)
        return
    tolerated = [node for node in selected if not _repelling(node, release)]
    if not tolerated:
        yield _tainted(selected[0], release, where)
        return
    fitting = [node for node in tolerated if not _short(node, release)]
    if not fitting:
        yield _too_small(tolerated, release, resource, where)
        return
    yield ok("Nodes", _names(fitting))
    if resource:
        yield _free(release, seen, fitting, resource, where)
        yield _driver(fitting, where)


def gpu_resource(release: Release) -> str:
    """Return the name of the GPU's resource; empty for a release without one."""
    limits = dig(release.container, "resources", "limits") or {}
    return next((key for key in limits if key.startswith(GPU_PREFIXES)), "")


def _requests(release: Release) -> dict[str, str]:
    resources = release.container.get("resources") or {}
    return {**(resources.get("limits") or {}), **(resources.get("requests") or {})}


def _labels(node: Object) -> dict[str, str]:
    return dict(node["metadata"].get("labels") or {})


def _has_labels(node: Object, release: Release) -> bool:
    labels = _labels(node)
    return all(labels.get(key) == value for key, value in (release.predictor.get("nodeSelector") or {}).items())


def _none_selected(release: Release, nodes: Sequence[Object], resource: str, where: Where) -> Finding:
    selector = release.predictor.get("nodeSelector") or {}
    said = ", ".join(f"{key}={value}" for key, value in selector.items())
    keys = sorted(selector)
    if not nodes or any(key.startswith(KNOWN_BEFORE_THE_NODE) for key in keys):
        reason = f"No node carries {said or 'any label'} now; whether an autoscaler makes one is not visible here."
        return unknown("Nodes", reason, where.kubectl("get", "nodes", "-L", ",".join(keys)))
    products = sorted({_labels(node)[PRODUCT] for node in nodes if PRODUCT in _labels(node)})
    if products:
        choice = json.dumps({PRODUCT: products[0]})
        command = where.helm("--set", "gpu.preset=none", "--set-json", f"nodeSelector={choice}")
        return missing("Nodes", f"No node carries {said}; there is {PRODUCT}={', '.join(products)}.", command)
    with_gpu = [node for node in nodes if resource and resource in (dig(node, "status", "allocatable") or {})]
    if with_gpu:
        command = where.kubectl("label", "node", with_gpu[0]["metadata"]["name"], *said.split(", "))
        return missing("Nodes", f"{_names(with_gpu)} has {resource}, and not the label {said}.", command)
    said += f", and none offers {resource}: add a node with a GPU, and NVIDIA's operator" if resource else ""
    return missing("Nodes", f"No node carries {said}.", _operator(where))


def _repelling(node: Object, release: Release) -> list[Object]:
    """Return the taints that keep the pod away."""
    tolerations = list(release.predictor.get("tolerations") or ())
    taints = [each for each in dig(node, "spec", "taints") or () if each.get("effect") != "PreferNoSchedule"]
    return [taint for taint in taints if not any(_tolerates(each, taint) for each in tolerations)]


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") and toleration["effect"] != taint.get("effect"):
        return False
    if not toleration.get("key"):
        return toleration.get("operator") == "Exists"
    same = toleration["key"] == taint.get("key")
    return same and (toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", ""))


def _tainted(node: Object, release: Release, where: Where) -> Finding:
    taints = _repelling(node, release)
    said = ", ".join(f"{each['key']}={each.get('value', '')}:{each.get('effect')}" for each in taints)
    wanted = [{"key": each["key"], "operator": "Exists", "effect": each.get("effect")} for each in taints]
    command = where.helm("--set-json", f"tolerations={json.dumps(wanted)}")
    return missing("Nodes", f"{node['metadata']['name']} is tainted {said}, which the pods do not tolerate.", command)


def _short(node: Object, release: Release) -> list[str]:
    """Return what the pod asks for and the whole node does not have."""
    allocatable = dig(node, "status", "allocatable") or {}
    asked = {key: value for key, value in _requests(release).items() if key in ASKED_OF_NODES or "/" in key}
    return [key for key, value in asked.items() if quantity(value) > quantity(allocatable.get(key, "0"))]


def _too_small(nodes: Sequence[Object], release: Release, resource: str, where: Where) -> Finding:
    short = _short(nodes[0], release)
    if resource in short and all(resource not in (dig(n, "status", "allocatable") or {}) for n in nodes):
        said = f"{_names(nodes)} offers no {resource}: NVIDIA's driver and device plugin are not there."
        return missing("Nodes", said, _operator(where))
    asked = _requests(release)
    wanted = ", ".join(f"{key} {asked[key]}" for key in short)
    half = ",".join(
        f"resources.requests.{key}={dig(nodes[0], 'status', 'allocatable', key) or 0}"
        for key in short
        if "/" not in key
    )
    command = where.helm("--set", half or "gpu.count=1")
    return missing("Nodes", f"No node is large enough: the pod asks for {wanted}.", command)


def _free(release: Release, seen: Seen, nodes: Sequence[Object], resource: str, where: Where) -> Finding:
    """Count the GPUs that no pod has; those of the release's own pods are its own to use."""
    name = "GPU"
    if seen.pods.unknown:
        return unknown(name, seen.pods.unknown, where.cluster_rights())
    own, foreign = Decimal(0), Decimal(0)
    names = {node["metadata"]["name"] for node in nodes}
    for pod in seen.pods.value or ():
        if dig(pod, "spec", "nodeName") not in names or dig(pod, "status", "phase") in ("Succeeded", "Failed"):
            continue
        taken = sum((quantity(value) for value in _gpus(pod, resource)), Decimal(0))
        if _is_own(pod, release, where):
            own += taken
        else:
            foreign += taken
    total = sum((quantity(dig(node, "status", "allocatable", resource)) for node in nodes), Decimal(0))
    needed = quantity(_requests(release)[resource])
    left = total - foreign
    said = f"{left:f} of {total:f} {resource} free" + (f", {own:f} of them in use by this release" if own else "")
    grows = any(label in _labels(node) for node in nodes for label in NODES_THAT_GROW)
    if left >= 2 * needed:
        return ok(name, said)
    if left >= needed:
        return ok(name, f"{said}: no second revision beside the first; roll out with --strategy swap")
    if grows:
        command = where.kubectl("get", "nodes", "-L", ",".join(NODES_THAT_GROW))
        return unknown(name, f"{said}; these nodes belong to a group that may grow.", command)
    return missing(name, f"{said}: the pod would stay Pending.", where.kubectl("describe", "nodes", *sorted(names)))


def _gpus(pod: Object, resource: str) -> Iterable[str]:
    for container in dig(pod, "spec", "containers") or ():
        yield str((dig(container, "resources", "requests") or {}).get(resource, 0))


def _is_own(pod: Object, release: Release, where: Where) -> bool:
    label = (pod["metadata"].get("labels") or {}).get(SERVICE_LABEL)
    return pod["metadata"].get("namespace") == where.namespace and label == release.name


def _driver(nodes: Sequence[Object], where: Where) -> Finding:
    name = "GPU driver"
    found = {
        node["metadata"]["name"]: int(next(_labels(node)[label] for label in DRIVER_LABELS if label in _labels(node)))
        for node in nodes
        if any(label in _labels(node) for label in DRIVER_LABELS)
    }
    old = {node: major for node, major in found.items() if major < LEAST_DRIVER}
    if old:
        said = ", ".join(f"{node} has driver {major}" for node, major in old.items())
        patch = json.dumps({"spec": {"driver": {"version": "580.95.05"}}})
        command = where.kubectl("patch", "clusterpolicy", "cluster-policy", "--type", "merge", "-p", patch)
        return missing(name, f"{said}; the image needs {LEAST_DRIVER} or later (CUDA 13).", command)
    if len(found) < len(nodes):
        said = f"No label of the nodes tells their driver; the image needs {LEAST_DRIVER} or later."
        show = ("--image=busybox", "--", "cat", "/host/proc/driver/nvidia/version")
        node = nodes[0]["metadata"]["name"]
        return unknown(name, said, where.kubectl("debug", f"node/{node}", "-it", *show))
    return ok(name, ", ".join(f"{node}: {major}" for node, major in found.items()))


def _operator(where: Where) -> str:
    return " ".join((*OPERATOR, "--create-namespace", "--kube-context", where.context))


def _names(nodes: Sequence[Object]) -> str:
    return ", ".join(str(node["metadata"]["name"]) for node in nodes)
