"""Standard mode: Deployments, `spec.canary[]` (KServe 0.20), and the merge patches that move them.

The stable Deployment is not touched before the promotion, so that undoing a canary is dropping its entry. For the
promotion it gets the canary's image while the canary serves all users: its only pod ends before the new one starts,
and KServe's webhook lets the canary's Deployment take over only together with another storage URI.

KServe splits the traffic in the HTTPRoute only: the cluster's ingress must be the Gateway API.
"""

from __future__ import annotations

import hashlib
from typing import Any

from mistral_cli.objects import Object, dig, image_of
from mistral_cli.rollout.state.observed import Observed
from mistral_cli.rollout.state.versions import Version, Versions

AUTOSCALER = "serving.kserve.io/autoscalerClass"


def predictor_service(service: str, predictor: str) -> str:
    """Return the name that KServe gives to a predictor's Deployment and Service."""
    return f"{service}-{predictor}-predictor" if predictor else f"{service}-predictor"


def versions(observed: Observed) -> Versions:
    """Return what the HTTPRoute and the Deployments say about the predictors."""
    deployments = {deployment["metadata"]["name"]: deployment for deployment in observed.deployments}
    canary = next(iter(dig(observed.service, "spec", "canary") or ()), None)
    weights = _weights(observed)

    def version(name: str) -> Version:
        deployment = deployments[name]
        return Version(
            name=name,
            image=image_of(deployment["spec"]["template"]["spec"]),
            ready=_is_rolled_out(deployment),
            share=weights.get(name, 0),
            routed=name in weights,
            url=f"http://{name}.{observed.namespace}.svc.cluster.local",
            source=deployment,
        )

    found = {name: version(name) for name in deployments}
    stable = found.get(predictor_service(observed.name, observed.predictor.get("name", "")))
    candidate = found.get(predictor_service(observed.name, canary["predictor"]["name"])) if canary else None
    wished = image_of(canary["predictor"]) if canary else image_of(observed.predictor)
    return Versions(
        stable=stable,
        candidate=candidate,
        all=tuple(found.values()),
        shares={name: weight for name, weight in weights.items() if weight},
        desired_image=wished,
        desired_share=canary["trafficPercent"] if canary else None,
        created=((candidate if canary else stable) or Version("", "", False)).image == wished,
        url=str(dig(observed.service, "status", "url") or ""),
    )


def _is_rolled_out(deployment: Object) -> bool:
    """Return whether a pod is available and all pods are of the newest template: old pods serve until then."""
    status = deployment.get("status") or {}
    return (
        (status.get("observedGeneration") or 0) >= (dig(deployment, "metadata", "generation") or 0)
        and (status.get("replicas") or 0) == (status.get("updatedReplicas") or 0)
        and (status.get("availableReplicas") or 0) > 0
    )


def _weights(observed: Observed) -> dict[str, int]:
    """Read the split where it is real; without an HTTPRoute everything goes to the stable predictor."""
    rules = dig(observed.route, "spec", "rules") or ()
    backends = next((rule["backendRefs"] for rule in rules if rule.get("backendRefs")), ())
    if not backends:
        return {predictor_service(observed.name, observed.predictor.get("name", "")): 100}
    total = sum(backend.get("weight", 1) for backend in backends) or 1
    return {backend["name"]: round(100 * backend.get("weight", 1) / total) for backend in backends}


def start_patch(observed: Observed, image: str, share: int) -> dict[str, Any]:
    """Return the patch that adds the canary: KServe merges it over the stable predictor, lists are replaced."""
    name = canary_name(image, str(observed.predictor.get("name", "")))
    predictor = {"name": name, "minReplicas": 1, **image_patch(observed, image)["spec"]["predictor"]}
    return {"spec": {"canary": [{"trafficPercent": share, "predictor": predictor}]}}


def canary_name(image: str, stable_name: str) -> str:
    """Return a predictor's name that follows from its image and differs from the stable one's."""
    name = "v" + hashlib.sha256(image.encode()).hexdigest()[:8]
    return name if name != stable_name else f"{name}-2"


def share_patch(observed: Observed, share: int) -> dict[str, Any]:
    """Return the patch of the traffic: the whole entry, because a merge patch replaces lists; none without a canary."""
    canary = dig(observed.service, "spec", "canary") or ()
    return {"spec": {"canary": [{**entry, "trafficPercent": share} for entry in canary] or None}}


def image_patch(observed: Observed, image: str) -> dict[str, Any]:
    """Return the patch that gives the stable predictor an image; a canary stays as it is."""
    containers = [dict(container) for container in observed.predictor["containers"]]
    containers[0]["image"] = image
    return {"spec": {"predictor": {"containers": containers}}}


def end_patch() -> dict[str, Any]:
    """Return the patch that drops the canary: KServe deletes its Deployment, which frees the GPU."""
    return {"spec": {"canary": None}}
