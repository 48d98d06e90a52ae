"""Whether there is room for a rollout: quotas, and GPUs on the nodes. Sentences out, one for each thing that is short.

KServe and Knative try one more pod before every update of the service. Without room for it even a change of the
traffic is refused, promotion and stop included: a rollout beside the old revision needs room for three pods, a
swap for two.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

from mistral_cli.objects import Object, dig, quantity
from mistral_cli.rollout.state.observed import Observed

GPU_PREFIXES = ("nvidia.com/", "amd.com/", "gpu.intel.com/")
NODES_THAT_GROW = (
    "karpenter.sh/nodepool", "eks.amazonaws.com/nodegroup", "cloud.google.com/gke-nodepool",
    "kubernetes.azure.com/agentpool", "cluster.x-k8s.io/machine",
)  # fmt: skip
"""Labels of nodes that something can add more of."""


def refusals(observed: Observed, swap: bool) -> list[str]:
    """Return what is short: a swap never has both versions running, and needs room for the tried pod alone."""
    return _quotas(observed, 1) if swap else [*_quotas(observed, 2), *_nodes(observed)]


def demand(predictor: Object) -> dict[str, Decimal]:
    """Return what one pod of the service takes from a quota, by the quota's key; queue-proxy's part is unknown."""
    taken = {"pods": Decimal(1), "count/pods": Decimal(1)}
    for side in ("requests", "limits"):
        for container in predictor.get("containers") or ():
            for resource, amount in (dig(container, "resources", side) or {}).items():
                for key in _quota_keys(side, resource):
                    taken[key] = taken.get(key, Decimal(0)) + quantity(amount)
    # Kubernetes copies a limit into a missing request.
    for key, amount in list(taken.items()):
        if key.startswith("limits."):
            taken.setdefault("requests." + key.removeprefix("limits."), amount)
    return taken


def _quota_keys(side: str, resource: str) -> Iterable[str]:
    yield f"{side}.{resource}"
    if side == "requests" and resource in ("cpu", "memory"):
        yield resource  # an old name of the same key


def _quotas(observed: Observed, extra_pods: int) -> list[str]:
    reasons = []
    taken = demand(observed.predictor)
    for quota in observed.quotas:
        hard, used = dig(quota, "status", "hard") or {}, dig(quota, "status", "used") or {}
        for key, limit in hard.items():
            if key not in taken:
                continue
            free = max(Decimal(0), quantity(limit) - quantity(used.get(key, "0")))
            needed = taken[key] * extra_pods
            if free < needed:
                reasons.append(
                    f"ResourceQuota {quota['metadata']['name']} has {_number(free)} of {key} free, and "
                    f"{extra_pods} more pods need {_number(needed)}. KServe tries a pod before every update: without "
                    f"room for it the rollout stops, and so do its promotion and its revert."
                )
    return reasons


def _nodes(observed: Observed) -> Iterable[str]:
    """Say when every node that could take the pod is full and none of them can be joined by another."""
    if observed.nodes is None or observed.node_pods is None:
        return
    wanted = {
        resource: amount
        for resource, amount in demand(observed.predictor).items()
        if resource.removeprefix("requests.").startswith(GPU_PREFIXES)
    }
    for key, needed in wanted.items():
        resource = key.removeprefix("requests.").removeprefix("limits.")
        nodes = [node for node in observed.nodes if _fits(node, observed.predictor, resource)]
        if not nodes or any(label in node["metadata"].get("labels", {}) for node in nodes for label in NODES_THAT_GROW):
            continue
        free = {node["metadata"]["name"]: _free(node, resource, observed.node_pods) for node in nodes}
        if all(amount < needed for amount in free.values()) and key.startswith("requests."):
            yield (
                f"No node has {_number(needed)} {resource} free ({', '.join(free)}), and none of them belongs to a "
                f"group that can grow. With one GPU use --strategy swap."
            )


def _fits(node: Object, predictor: Object, resource: str) -> bool:
    labels = node["metadata"].get("labels", {})
    selected = all(labels.get(key) == value for key, value in (predictor.get("nodeSelector") or {}).items())
    return selected and resource in (dig(node, "status", "allocatable") or {})


def _free(node: Object, resource: str, pods: Iterable[Object]) -> Decimal:
    left = quantity(dig(node, "status", "allocatable", resource))
    for pod in pods:
        if dig(pod, "spec", "nodeName") == node["metadata"]["name"] and dig(pod, "status", "phase") in (
            "Running",
            "Pending",
        ):
            for container in dig(pod, "spec", "containers") or ():
                left -= quantity((dig(container, "resources", "requests") or {}).get(resource, 0))
    return left


def _number(amount: Decimal) -> str:
    return f"{amount.normalize():f}"
