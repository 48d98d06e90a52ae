"""`manifests/` gives kubectl what the chart gives Helm."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts.render_manifests import IMAGE, MANIFESTS, NO_TAG, Key, Object, load, manifest, manifests, tool
from tests.support.helm import SCENARIOS

OVERLAYS = sorted(path.parent.name for path in MANIFESTS.glob("overlays/*/kustomization.yaml"))
HELM_ONLY = {"relay", "standard-canary"}
"""Templates that kustomize would have to spell out: the relay, a second predictor."""


@cache
def built(directory: Path) -> str:
    """What kustomize makes of a directory."""
    command = [tool("kubectl"), "kustomize", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sorted_lists(value: Any) -> Any:
    """The value with lists of named entries in the order of their names, which means nothing to Kubernetes."""
    if isinstance(value, dict):
        return {key: sorted_lists(entry) for key, entry in value.items()}
    if isinstance(value, list):
        entries = [sorted_lists(entry) for entry in value]
        named = all(isinstance(entry, dict) and "name" in entry for entry in entries)
        return sorted(entries, key=lambda entry: str(entry["name"])) if named else entries
    return value


def kustomization(directory: Path, text: str) -> dict[Key, Object]:
    """The objects of a user's own kustomization."""
    (directory / "kustomization.yaml").write_text(text)
    return load(built(directory))


def test_the_rendered_files_are_the_ones_that_the_chart_renders() -> None:
    rendered = manifests()
    assert {name: (MANIFESTS / name).read_text() for name in rendered} == rendered, "run `make manifests`"
    assert sorted(path.stem for path in MANIFESTS.glob("*.yaml")) == ["gfd", "minimal-cpu"]


@pytest.mark.parametrize("scenario", OVERLAYS)
def test_an_overlay_gives_the_objects_of_its_scenario(scenario: str) -> None:
    expected = manifest(scenario)
    if scenario == "canary":  # its image is the user's to name
        [service] = [o for (kind, _), o in expected.items() if kind == "InferenceService"]
        assert service["spec"]["predictor"]["containers"][0]["image"] == f"{IMAGE}:{NO_TAG}"

    assert sorted_lists(load(built(MANIFESTS / "overlays" / scenario))) == sorted_lists(expected)


def test_the_base_and_the_quick_start_are_the_scenario_gfd() -> None:
    assert load(built(MANIFESTS / "base")) == load((MANIFESTS / "gfd.yaml").read_text()) == manifest("gfd")


def test_every_scenario_has_an_overlay_unless_it_is_the_base_or_helms_alone() -> None:
    assert {*OVERLAYS, "gfd"} == set(SCENARIOS) - HELM_ONLY


@pytest.mark.parametrize("scenario", [*OVERLAYS, "gfd"])
def test_an_object_that_kubectl_applies_names_its_namespace_and_not_helm(scenario: str) -> None:
    objects = load(built(MANIFESTS / ("base" if scenario == "gfd" else f"overlays/{scenario}")))
    for (kind, name), o in objects.items():
        assert kind != "Secret"
        assert "helm" not in yaml.safe_dump(o["metadata"]).lower()
        if kind not in {"ClusterStorageContainer", "Namespace"}:
            assert o["metadata"]["namespace"] == "mistral", name
    assert ("Namespace", "mistral") in objects


def test_a_users_kustomization_names_the_image(tmp_path: Path) -> None:
    relative = Path("../" * len(tmp_path.resolve().parts[1:])) / (MANIFESTS / "overlays" / "eks").relative_to("/")
    digest = f"sha256:{'1' * 64}"
    text = f"resources: [{relative}]\nimages: [{{name: {IMAGE}, newName: registry.example.com/us, digest: '{digest}'}}]"
    service = kustomization(tmp_path, text)[("InferenceService", "mistral-7b")]

    assert service["spec"]["predictor"]["containers"][0]["image"] == f"registry.example.com/us@{digest}"


def test_names_that_objects_refer_to_follow_a_prefix(tmp_path: Path) -> None:
    relative = Path("../" * len(tmp_path.resolve().parts[1:])) / (MANIFESTS / "overlays" / "production").relative_to(
        "/"
    )
    objects = kustomization(tmp_path, f"resources: [{relative}]\nnamePrefix: team-\n")
    predictor = objects[("InferenceService", "team-mistral-7b")]["spec"]["predictor"]

    assert ("ServiceAccount", predictor["serviceAccountName"]) in objects
    assert ("ClusterStorageContainer", predictor["storageContainerName"]) in objects
    label = {"serving.kserve.io/inferenceservice": "team-mistral-7b"}
    assert objects[("PodMonitor", "team-mistral-7b")]["spec"]["selector"]["matchLabels"] == label
    assert objects[("NetworkPolicy", "team-mistral-7b")]["spec"]["podSelector"]["matchLabels"] == label


def test_the_operators_object_has_the_keys_of_the_config_maps() -> None:
    operator = yaml.safe_load((MANIFESTS / "cluster" / "operator" / "knativeserving.yaml").read_text())
    maps = [yaml.safe_load(path.read_text()) for path in (MANIFESTS / "cluster").glob("config-*.yaml")]

    assert operator["spec"]["config"] == {o["metadata"]["name"].removeprefix("config-"): o["data"] for o in maps}


@pytest.mark.parametrize("path", sorted((MANIFESTS / "cluster").glob("config-*.yaml")), ids=lambda p: p.stem)
def test_every_key_for_the_cluster_has_its_reason(path: Path) -> None:
    lines = path.read_text().splitlines()
    data = lines[lines.index("data:") + 1 :]
    for before, line in zip(["", *data], data, strict=False):
        if not line.lstrip().startswith("#"):
            assert before.lstrip().startswith("#"), line


def test_the_docs_put_the_image_into_the_quick_start() -> None:
    page = (MANIFESTS.parent / "docs" / "install.md").read_text()
    [command] = [line.strip().split(" | ")[0] for line in page.splitlines() if line.strip().startswith("sed ")]
    variables = {"REPOSITORY": "registry.example.com/us", "DIGEST": f"sha256:{'1' * 64}"}
    shell = ["bash", "-euc", command]
    text = subprocess.run(shell, env=variables, cwd=MANIFESTS.parent, capture_output=True, text=True).stdout

    [service] = [o for (kind, _), o in load(text).items() if kind == "InferenceService"]
    image = service["spec"]["predictor"]["containers"][0]["image"]
    assert image == f"registry.example.com/us@sha256:{'1' * 64}"
