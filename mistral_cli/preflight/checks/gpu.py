"""Checks the GPUs of the nodes that fit: one is free, and its driver is new enough."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from decimal import Decimal

from mistral_cli.objects import Object, dig, quantity
from mistral_cli.preflight.checks.finding import Finding, missing, ok, unknown
from mistral_cli.preflight.observed import Observed
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import Target
from mistral_cli.rollout.planning.capacity import NODES_THAT_GROW

LEAST_DRIVER = 580
"""The driver that the image's CUDA 13 needs."""
DRIVER_LABELS = ("nvidia.com/cuda.driver-version.major", "nvidia.com/cuda.driver.major")


def check(release: Release, observed: Observed, nodes: Sequence[Object], target: Target) -> Iterable[Finding]:
    """Yield a finding for free GPUs and one for the driver."""
    yield _free(release, observed, nodes, target)
    yield _driver(nodes, target)


def _free(release: Release, observed: Observed, nodes: Sequence[Object], target: Target) -> Finding:
    """Count the GPUs that no pod uses; those of the release's own pods count as free."""
    name, resource = "GPU", release.gpu_resource
    if observed.pods.unknown:
        return unknown(name, observed.pods.unknown, target.cluster_rights())
    own, foreign = Decimal(0), Decimal(0)
    names = {node["metadata"]["name"] for node in nodes}
    for pod in observed.pods.value or ():
        if dig(pod, "spec", "nodeName") not in names or dig(pod, "status", "phase") in ("Succeeded", "Failed"):
            continue
        taken = sum((quantity(value) for value in _gpus(pod, resource)), Decimal(0))
        if release.owns(pod, target.namespace):
            own += taken
        else:
            foreign += taken
    total = sum((quantity(dig(node, "status", "allocatable", resource)) for node in nodes), Decimal(0))
    needed = quantity(release.requests[resource])
    left = total - foreign
    message = f"{left:f} of {total:f} {resource} free" + (f", {own:f} of them in use by this release" if own else "")
    grows = any(label in _labels(node) for node in nodes for label in NODES_THAT_GROW)
    if left >= 2 * needed:
        return ok(name, message)
    if left >= needed:
        return ok(name, f"{message}: too few for a second revision; roll out with --strategy swap")
    if grows:
        command = target.kubectl("get", "nodes", "-L", ",".join(NODES_THAT_GROW))
        return unknown(name, f"{message}; these nodes belong to a group that may grow.", command)
    return missing(name, f"{message}: the pod would stay Pending.", target.kubectl("describe", "nodes", *sorted(names)))


def _gpus(pod: Object, resource: str) -> Iterable[str]:
    for container in dig(pod, "spec", "containers") or ():
        yield str((dig(container, "resources", "requests") or {}).get(resource, 0))


def _driver(nodes: Sequence[Object], target: Target) -> Finding:
    name = "GPU driver"
    found = {
        node["metadata"]["name"]: int(next(_labels(node)[label] for label in DRIVER_LABELS if label in _labels(node)))
        for node in nodes
        if any(label in _labels(node) for label in DRIVER_LABELS)
    }
    old = {node: major for node, major in found.items() if major < LEAST_DRIVER}
    if old:
        message = ", ".join(f"{node} has driver {major}" for node, major in old.items())
        patch = json.dumps({"spec": {"driver": {"version": "580.95.05"}}})
        command = target.kubectl("patch", "clusterpolicy", "cluster-policy", "--type", "merge", "-p", patch)
        return missing(name, f"{message}; the image needs {LEAST_DRIVER} or later (CUDA 13).", command)
    if len(found) < len(nodes):
        message = f"The nodes have no label with their driver's version; the image needs {LEAST_DRIVER} or later."
        show = ("--image=busybox", "--", "cat", "/host/proc/driver/nvidia/version")
        node = nodes[0]["metadata"]["name"]
        return unknown(name, message, target.kubectl("debug", f"node/{node}", "-it", *show))
    return ok(name, ", ".join(f"{node}: {major}" for node, major in found.items()))


def _labels(node: Object) -> dict[str, str]:
    return dict(node["metadata"].get("labels") or {})
