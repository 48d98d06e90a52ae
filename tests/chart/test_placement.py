"""The nodes that the pods select, and the taints that they tolerate."""

from __future__ import annotations

import pytest

from tests.support.helm import (
    container,
    predictor,
)


@pytest.mark.parametrize(
    ("preset", "selector"),
    [
        ("gfd", {"nvidia.com/gpu.product": "NVIDIA-A10G"}),
        ("eks", {"node.kubernetes.io/instance-type": "g5.2xlarge"}),
        ("karpenter", {"karpenter.k8s.aws/instance-gpu-name": "a10g"}),
        ("eks-auto", {"eks.amazonaws.com/instance-gpu-name": "a10g"}),
    ],
)
def test_a_preset_finds_an_a10g(preset: str, selector: dict[str, str]) -> None:
    assert predictor({"gpu.preset": preset})["nodeSelector"] == selector


def test_no_preset_leaves_the_selector_to_the_user() -> None:
    assert "nodeSelector" not in predictor({"gpu.preset": "none"})
    own = {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    assert predictor({"gpu.preset": "none", "nodeSelector": own})["nodeSelector"] == own


def test_a_selector_of_the_users_joins_the_preset_and_wins_over_it() -> None:
    own = {"nvidia.com/gpu.product": "NVIDIA-A10G-SHARED", "zone": "a"}
    assert predictor({"nodeSelector": own})["nodeSelector"] == own


def test_the_gpu_taint_is_always_tolerated_and_others_are_added() -> None:
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    sku = {"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"}
    assert predictor()["tolerations"] == [gpu]
    assert predictor({"tolerations": [sku]})["tolerations"] == [gpu, sku]


@pytest.mark.parametrize(
    ("resource", "taint"),
    [
        ("nvidia.com/mig-3g.20gb", "nvidia.com/gpu"),
        ("nvidia.com/gpu.shared", "nvidia.com/gpu"),
        ("amd.com/gpu", "amd.com/gpu"),
    ],
)
def test_a_slice_of_a_gpu_is_asked_for_by_its_name_and_tolerated_by_the_whole_ones(resource: str, taint: str) -> None:
    values = {"gpu.resourceName": resource, "gpu.preset": "none"}
    assert container(values)["resources"]["limits"][resource] == "1"
    assert "nvidia.com/gpu" not in container(values)["resources"]["limits"]
    assert [t["key"] for t in predictor(values)["tolerations"]] == [taint]


def test_a_cpu_demo_asks_for_nothing_of_a_gpu_node() -> None:
    demo = predictor(scenario="minimal-cpu")
    assert not {"nodeSelector", "tolerations"} & demo.keys()
    assert "nvidia.com/gpu" not in demo["containers"][0]["resources"]["limits"]
