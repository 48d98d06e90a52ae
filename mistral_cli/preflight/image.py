"""Checks the server's image: where it comes from, whether it is there, and for which platforms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..rollout.planning.preconditions import RESOLVED_BY_NAME
from ..rollout.state.observed import dig
from . import registry
from .answer import Answer, Manifest, Object, Outside, Seen
from .finding import Finding, missing, ok, unknown
from .release import Release
from .where import Where

NAME = "Image"
LISTED_IMAGES = 50
"""The kubelet lists this many images of a node, the largest first."""


def check(release: Release, seen: Seen, outside: Outside, where: Where) -> Iterable[Finding]:
    """Yield one finding."""
    image = release.image
    if image.startswith(RESOLVED_BY_NAME):
        yield _loaded(image, seen, where)
    elif not registry.parse(image).host:
        said = f"{image} names no registry: each node's container runtime decides where it comes from."
        yield unknown(NAME, said, where.helm("--set", "image.repository=registry.example.com/mistral-7b-kserve"))
    else:
        yield _pulled(release, seen, outside.image, where)


def _loaded(image: str, seen: Seen, where: Where) -> Finding:
    load = f"docker save {image} | ctr -n k8s.io images import -"
    if seen.nodes.unknown:
        return unknown(NAME, seen.nodes.unknown, where.cluster_rights())
    lists = {n["metadata"]["name"]: dig(n, "status", "images") or () for n in seen.nodes.value or ()}
    holders = [name for name, images in lists.items() if any(image in (each.get("names") or ()) for each in images)]
    if holders:
        return ok(NAME, f"{image} is loaded on {', '.join(holders)}")
    if any(len(images) >= LISTED_IMAGES for images in lists.values()):
        return unknown(NAME, f"{image} is to be loaded on the nodes, and they list no more than some images.", load)
    return missing(NAME, f"{image} is never pulled, and no node has it.", load)


def _pulled(release: Release, seen: Seen, answer: Answer[Manifest], where: Where) -> Finding:
    image = release.image
    reference = registry.parse(image)
    build = f"docker buildx build --platform linux/amd64 --push -t {image.partition('@')[0]} ."
    inspect = f"docker buildx imagetools inspect {image}"
    by_digest = bool(reference.digest)
    if answer.refused and not by_digest and release.knative:
        said = (
            f"{answer.refused} without a login, and {image} is a tag: Knative resolves tags itself, not with the "
            f"pods' pull Secrets. Name the digest."
        )
        return missing(NAME, said, _set_digest("$(" + _digest_of(image) + ")", where))
    if answer.refused:
        said = f"{answer.refused}: it wants a login that is not in the pods' pull Secrets, or not readable."
        return unknown(NAME, said, inspect)
    if answer.unknown:
        return unknown(NAME, answer.unknown, inspect)
    if answer.value is None:
        return missing(NAME, f"The registry has no {image}.", build)
    wanted = platforms(seen.nodes.value or ())
    if lacking := sorted(wanted - answer.value.platforms):
        said = f"{image} is built for {', '.join(sorted(answer.value.platforms))}, and not for {', '.join(lacking)}."
        return missing(NAME, said, build)
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


def _set_digest(digest: str, where: Where) -> str:
    return f'{where.helm()} --set image.digest="{digest}"'
