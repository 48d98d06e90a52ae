"""Checks the server's image: its registry, whether it exists, and its platforms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mistral_cli.objects import Object, dig
from mistral_cli.preflight.checks.finding import Finding, missing, ok, unknown
from mistral_cli.preflight.observed import Answer, External, Manifest, Observed
from mistral_cli.preflight.release.artifacts import parse_image
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import Target
from mistral_cli.rollout.planning.preconditions import RESOLVED_BY_NAME

NAME = "Image"
LISTED_IMAGES = 50
"""The kubelet lists this many images of a node, the largest first."""


def check(release: Release, observed: Observed, external: External, target: Target) -> Iterable[Finding]:
    """Yield one finding."""
    image = release.image
    if image.startswith(RESOLVED_BY_NAME):
        yield _loaded(image, observed, target)
    elif not parse_image(image).host:
        message = f"{image} names no registry, so each node's container runtime chooses one."
        yield unknown(NAME, message, target.helm("--set", "image.repository=registry.example.com/mistral-7b-kserve"))
    else:
        yield _pulled(release, observed, external.image, target)


def _loaded(image: str, observed: Observed, target: Target) -> Finding:
    load = f"docker save {image} | ctr -n k8s.io images import -"
    if observed.nodes.unknown:
        return unknown(NAME, observed.nodes.unknown, target.cluster_rights())
    lists = {n["metadata"]["name"]: dig(n, "status", "images") or () for n in observed.nodes.value or ()}
    holders = [name for name, images in lists.items() if any(image in (each.get("names") or ()) for each in images)]
    if holders:
        return ok(NAME, f"{image} is loaded on {', '.join(holders)}")
    if any(len(images) >= LISTED_IMAGES for images in lists.values()):
        return unknown(
            NAME, f"{image} must be loaded on the nodes, and the nodes list only some of their images.", load
        )
    return missing(NAME, f"{image} has the pull policy Never, and no node has it.", load)


def _pulled(release: Release, observed: Observed, answer: Answer[Manifest], target: Target) -> Finding:
    image = release.image
    reference = parse_image(image)
    build = f"docker buildx build --platform linux/amd64 --push -t {image.partition('@')[0]} ."
    inspect = f"docker buildx imagetools inspect {image}"
    by_digest = bool(reference.digest)
    if answer.refused and not by_digest and release.knative:
        message = (
            f"{answer.refused} without a login, and {image} is a tag: Knative resolves tags itself, not with the "
            f"pods' pull Secrets. Name the digest."
        )
        return missing(NAME, message, _set_digest("$(" + _digest_of(image) + ")", target))
    if answer.refused:
        message = f"{answer.refused}: it needs a login that is not in the pods' pull Secrets, or that cannot be read."
        return unknown(NAME, message, inspect)
    if answer.unknown:
        return unknown(NAME, answer.unknown, inspect)
    if answer.value is None:
        return missing(NAME, f"The registry has no {image}.", build)
    wanted = platforms(observed.nodes.value or ())
    if lacking := sorted(wanted - answer.value.platforms):
        message = f"{image} is built for {', '.join(sorted(answer.value.platforms))}, and not for {', '.join(lacking)}."
        return missing(NAME, message, build)
    if by_digest:
        return ok(NAME, f"{image}, {', '.join(sorted(wanted))}")
    return ok(NAME, f"{image} is a tag, now {answer.value.digest}; a digest cannot move")


def platforms(nodes: Sequence[Object]) -> frozenset[str]:
    """Return the platforms of the nodes that have GPUs, else of the cluster; amd64 where none is known."""
    labels = [node["metadata"].get("labels") or {} for node in nodes]
    gpu = [each for each in labels if any(key.startswith("nvidia.com/gpu") for key in each)] or labels
    found = {str(each["kubernetes.io/arch"]) for each in gpu if "kubernetes.io/arch" in each}
    return frozenset(f"linux/{arch}" for arch in found) or frozenset({"linux/amd64"})


def _digest_of(image: str) -> str:
    return f"docker buildx imagetools inspect {image} --format '{{{{.Manifest.Digest}}}}'"


def _set_digest(digest: str, target: Target) -> str:
    return f'{target.helm()} --set image.digest="{digest}"'
