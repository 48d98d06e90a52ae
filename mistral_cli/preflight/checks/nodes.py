"""Checks the nodes: one has the release's labels, its taints are tolerated, and it is large enough."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from mistral_cli.objects import Object, dig, quantity
from mistral_cli.preflight.checks import gpu
from mistral_cli.preflight.checks.finding import Finding, missing, ok, unknown
from mistral_cli.preflight.observed import Observed
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import Target

NAME = "Nodes"
PRODUCT = "nvidia.com/gpu.product"
AUTOSCALER_LABELS = (
    "karpenter.", "eks.amazonaws.com/", "k8s.amazonaws.com/", "cloud.google.com/", "kubernetes.azure.com/",
    "node.kubernetes.io/instance-type",
)  # fmt: skip
"""An autoscaler adds a node for these labels, so it need not be there yet."""
NODE_RESOURCES = ("cpu", "memory", "ephemeral-storage")
OPERATOR = ("helm", "upgrade", "--install", "gpu-operator", "nvidia/gpu-operator", "-n", "gpu-operator")


def check(release: Release, observed: Observed, target: Target) -> Iterable[Finding]:
    """Yield a finding for the nodes; with a GPU also one for free GPUs and one for the driver."""
    if observed.nodes.unknown:
        yield unknown(NAME, observed.nodes.unknown, target.cluster_rights())
        return
    nodes = observed.nodes.value or ()
    selected = [node for node in nodes if _has_labels(node, release)]
    if not selected:
        yield _none_selected(release, nodes, target)
        return
    tolerated = [node for node in selected if not _repelling(node, release)]
    if not tolerated:
        yield _tainted(selected[0], release, target)
        return
    fitting = [node for node in tolerated if not _short(node, release)]
    if not fitting:
        yield _too_small(tolerated, release, target)
        return
    yield ok(NAME, _names(fitting))
    if release.gpu_resource:
        yield from gpu.check(release, observed, fitting, target)


def _labels(node: Object) -> dict[str, str]:
    return dict(node["metadata"].get("labels") or {})


def _has_labels(node: Object, release: Release) -> bool:
    labels = _labels(node)
    return all(labels.get(key) == value for key, value in (release.predictor.get("nodeSelector") or {}).items())


def _none_selected(release: Release, nodes: Sequence[Object], target: Target) -> Finding:
    selector = release.predictor.get("nodeSelector") or {}
    resource, keys = release.gpu_resource, sorted(selector)
    labels = ", ".join(f"{key}={value}" for key, value in selector.items())
    if not nodes or any(key.startswith(AUTOSCALER_LABELS) for key in keys):
        message = (
            f"No node has {labels or 'any label'} now, and the command cannot see whether an autoscaler creates one."
        )
        return unknown(NAME, message, target.kubectl("get", "nodes", "-L", ",".join(keys)))
    products = sorted({_labels(node)[PRODUCT] for node in nodes if PRODUCT in _labels(node)})
    if products:
        choice = json.dumps({PRODUCT: products[0]})
        command = target.helm("--set", "gpu.preset=none", "--set-json", f"nodeSelector={choice}")
        return missing(NAME, f"No node has the label {labels}; nodes have {PRODUCT}={', '.join(products)}.", command)
    with_gpu = [node for node in nodes if resource and resource in (dig(node, "status", "allocatable") or {})]
    if with_gpu:
        command = target.kubectl("label", "node", with_gpu[0]["metadata"]["name"], *labels.split(", "))
        return missing(NAME, f"{_names(with_gpu)} has {resource}, but not the label {labels}.", command)
    more = f", and none offers {resource}: add a node with a GPU, and NVIDIA's operator" if resource else ""
    return missing(NAME, f"No node has the label {labels}{more}.", _operator(target))


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


def _tainted(node: Object, release: Release, target: Target) -> Finding:
    taints = _repelling(node, release)
    names = ", ".join(f"{each['key']}={each.get('value', '')}:{each.get('effect')}" for each in taints)
    wanted = [{"key": each["key"], "operator": "Exists", "effect": each.get("effect")} for each in taints]
    command = target.helm("--set-json", f"tolerations={json.dumps(wanted)}")
    return missing(NAME, f"{node['metadata']['name']} is tainted {names}, which the pods do not tolerate.", command)


def _short(node: Object, release: Release) -> list[str]:
    """Return what the pod asks for and the whole node does not have."""
    allocatable = dig(node, "status", "allocatable") or {}
    asked = {key: value for key, value in release.requests.items() if key in NODE_RESOURCES or "/" in key}
    return [key for key, value in asked.items() if quantity(value) > quantity(allocatable.get(key, "0"))]


def _too_small(nodes: Sequence[Object], release: Release, target: Target) -> Finding:
    resource, short = release.gpu_resource, _short(nodes[0], release)
    if resource in short and all(resource not in (dig(n, "status", "allocatable") or {}) for n in nodes):
        message = f"{_names(nodes)} offers no {resource}: NVIDIA's driver or device plugin is missing."
        return missing(NAME, message, _operator(target))
    asked = release.requests
    wanted = ", ".join(f"{key} {asked[key]}" for key in short)
    half = ",".join(
        f"resources.requests.{key}={dig(nodes[0], 'status', 'allocatable', key) or 0}"
        for key in short
        if "/" not in key
    )
    command = target.helm("--set", half or "gpu.count=1")
    return missing(NAME, f"No node is large enough: the pod asks for {wanted}.", command)


def _operator(target: Target) -> str:
    return " ".join((*OPERATOR, "--create-namespace", "--kube-context", target.context))


def _names(nodes: Sequence[Object]) -> str:
    return ", ".join(str(node["metadata"]["name"]) for node in nodes)
