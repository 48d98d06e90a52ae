"""The RBAC manifests for CI grant what preflight asks for, and nothing more."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.cluster_api.admission import NAMESPACE, SERVICE
from tests.support.preflight_runs import site

MANIFESTS = Path(__file__).parents[3] / "manifests" / "ci"
VERBS = {"GET": "get", "POST": "create", "PUT": "update"}

Right = tuple[str, str, str, str]
"""Namespace (empty: the cluster), API group, resource, verb."""


def granted() -> set[Right]:
    documents = [d for name in ("preflight.yaml", "preflight-cluster.yaml")
                 for d in yaml.safe_load_all((MANIFESTS / name).read_text())]  # fmt: skip
    return {
        ("" if role["kind"] == "ClusterRole" else role["metadata"].get("namespace", NAMESPACE), group, resource, verb)
        for role in documents
        if role["kind"] in ("Role", "ClusterRole")
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def right(method: str, path: str) -> Right | None:
    """Return what a request needs; None for `/version` and the discovery, which everyone may ask."""
    root, *parts = path.strip("/").split("/")
    if root == "version" or (root == "apis" and len(parts) == 2):
        return None
    group = parts[0] if root == "apis" else ""
    rest = parts[2:] if root == "apis" else parts[1:]
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    verb = "list" if method == "GET" and len(rest) == 1 else VERBS[method]
    return namespace, group, rest[0], verb


@pytest.mark.chart
def test_the_roles_grant_exactly_what_preflight_asks_for(tmp_path: Path) -> None:
    runs = [
        ("--set", "storage.cache.enabled=true"),
        ("--set", "storage.initializer.create=false", "--set", "storage.initializer.name=shared"),
        ("--set", "inferenceService.mode=Standard", "--set", "scaling.standard.autoscaler=none",
         "--set", "scaling.minReplicas=1", "--set", "scaling.maxReplicas=1"),
    ]  # fmt: skip
    with site(tmp_path) as at:
        for sets in runs:
            at.findings(*sets)
        del at.store.objects[SERVICE]
        at.findings()
        asked = {found for method, path, _ in at.store.asked if (found := right(method, path))}
    assert asked == granted()
