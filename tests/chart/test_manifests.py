"""`manifests/` is what the chart renders, in both its forms."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from charts.render_manifests import MANIFESTS, difference, load, manifests, render, tool
from tests.support.helm import SCENARIOS


def test_the_manifests_are_the_ones_that_the_chart_renders() -> None:
    there = {
        path.relative_to(MANIFESTS).as_posix(): path.read_text()
        for path in MANIFESTS.rglob("*.yaml")
        if path.parent.name != "cluster"
    }
    assert there == manifests(), "run `make manifests`"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kustomize_and_helm_give_the_same_objects(scenario: str) -> None:
    command = [tool("kubectl"), "kustomize", str(MANIFESTS / "overlays" / scenario)]
    built = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert load(built) == load(render(scenario))


def test_the_base_is_the_charts_defaults() -> None:
    command = [tool("kubectl"), "kustomize", str(MANIFESTS / "base")]
    built = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert load(built) == load(render())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_object_of_a_namespace_names_it(scenario: str) -> None:
    for (kind, name), o in load(render(scenario)).items():
        if kind != "ClusterStorageContainer":
            assert o["metadata"]["namespace"] == "mistral", name


def test_no_manifest_holds_a_secret_or_a_hook() -> None:
    for scenario in SCENARIOS:
        for (kind, _), o in load(render(scenario)).items():
            assert kind != "Secret"
            assert "helm.sh/hook" not in o["metadata"].get("annotations", {})


@pytest.mark.parametrize("path", sorted((MANIFESTS / "cluster").glob("config-*.yaml")), ids=lambda p: p.stem)
def test_every_key_for_the_cluster_has_its_reason(path: Path) -> None:
    lines = path.read_text().splitlines()
    data = lines[lines.index("data:") + 1 :]
    for before, line in zip(["", *data], data, strict=False):
        if not line.lstrip().startswith("#"):
            assert before.lstrip().startswith("#"), line


@pytest.mark.parametrize(
    ("old", "new", "operations"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, [{"op": "replace", "path": "/a", "value": 2}]),
        ({"a": 1}, {}, [{"op": "remove", "path": "/a"}]),
        ({}, {"a/b~c": 1}, [{"op": "add", "path": "/a~1b~0c", "value": 1}]),
        ({"a": [1, 2]}, {"a": [1, 3]}, [{"op": "replace", "path": "/a/1", "value": 3}]),
        ({"a": [1]}, {"a": [1, 2]}, [{"op": "replace", "path": "/a", "value": [1, 2]}]),
        ({"a": True}, {"a": 1}, [{"op": "replace", "path": "/a", "value": 1}]),
    ],
)
def test_a_difference_is_a_json_patch(old: object, new: object, operations: object) -> None:
    assert difference(old, new) == operations
