"""The RBAC manifest for CI allows what the command asks for, and nothing that it never asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mistral_cli.rollout import verbs
from mistral_cli.rollout.planning.preconditions import Options
from tests.support.cluster_api.knative import Image
from tests.support.cluster_api.runs import NEW, Bench, bench
from tests.support.cluster_api.standard import StandardWorld

MANIFESTS = Path(__file__).parents[3] / "manifests" / "ci"
VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}

Right = tuple[str, str, str]
"""API group, resource, verb."""


def granted(file: str, kind: str) -> set[Right]:
    """Return the rights of the manifest's role."""
    documents = list(yaml.safe_load_all((MANIFESTS / file).read_text()))
    (role,) = [document for document in documents if document["kind"] == kind]
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def needed(at: Bench) -> tuple[set[Right], set[Right]]:
    """Return what was asked for in the namespace, and beyond it."""
    inside, beyond = set(), set()
    for method, path, _ in at.world.store.asked:
        parts = path.strip("/").split("/")
        group = parts[1] if parts[0] == "apis" else ""
        rest = parts[3:] if parts[0] == "apis" else parts[2:]
        namespaced = rest[0] == "namespaces"
        resource, *name = rest[2:] if namespaced else rest
        verb = "list" if method == "GET" and not name else VERBS[method]
        kind = f"{resource}/{name[1]}" if len(name) > 1 else resource
        (inside if namespaced else beyond).add((group, kind, verb))
    return inside, beyond


def test_the_roles_grant_exactly_what_rollouts_ask_for(tmp_path: Path) -> None:
    inside, beyond = set[Right](), set[Right]()
    worlds: list[dict[str, Any]] = [
        {}, {"images": {NEW: Image(crashes=True)}}, {"gpus": 1}, {"kind": StandardWorld},
    ]  # fmt: skip
    for world in worlds:
        with bench(tmp_path, **world) as at:
            at.deploy(strategy="swap" if "gpus" in world else "canary")
            for found, more in zip((inside, beyond), needed(at), strict=True):
                found |= more
    with bench(tmp_path) as at:
        verbs.start(at.executor(), Options(NEW, steps=(10,)))
        verbs.stop(at.executor())
        inside |= needed(at)[0]
    assert inside == granted("rollout.yaml", "Role")
    assert beyond == granted("rollout-nodes.yaml", "ClusterRole")
