"""Quotas and GPUs, before anything is touched."""

from __future__ import annotations

from typing import Any

import pytest

from mistral_cli.objects import quantity
from mistral_cli.rollout.planning import capacity
from mistral_cli.rollout.planning.capacity import demand
from mistral_cli.rollout.state.observed import Observed
from tests.support.cluster_api.kserve import inference_service

Object = dict[str, Any]


def quota(key: str, hard: str, used: str) -> Object:
    return {"metadata": {"name": "team"}, "status": {"hard": {key: hard}, "used": {key: used}}}


def node(gpus: str = "1", **labels: str) -> Object:
    allocatable = {"cpu": "8", "nvidia.com/gpu": gpus}
    return {"metadata": {"name": "gpu-1", "labels": labels}, "status": {"allocatable": allocatable}}


def user_of_a_gpu() -> Object:
    container = {"resources": {"requests": {"nvidia.com/gpu": "1"}}}
    return {"spec": {"nodeName": "gpu-1", "containers": [container]}, "status": {"phase": "Running"}}


def refusals(*, swap: bool = False, **objects: Any) -> list[str]:
    return capacity.refusals(Observed(inference_service("image"), **objects), swap)


@pytest.mark.parametrize(
    ("said", "value"), [("500m", "0.5"), ("16Gi", str(16 * 2**30)), ("2", "2"), ("1.5", "1.5"), ("3k", "3000")]
)
def test_quantities_are_read_as_kubernetes_writes_them(said: str, value: str) -> None:
    assert quantity(said) == quantity(value)


def test_a_limit_alone_counts_as_a_request_too() -> None:
    container = {"resources": {"limits": {"memory": "4Gi"}}}
    assert demand({"containers": [container]})["requests.memory"] == quantity("4Gi")


@pytest.mark.parametrize(
    ("key", "hard", "used", "refused"),
    [
        ("pods", "3", "1", False),
        ("pods", "2", "1", True),
        ("requests.nvidia.com/gpu", "3", "1", False),
        ("requests.nvidia.com/gpu", "2", "1", True),
        ("limits.memory", "12Gi", "4Gi", False),
        ("limits.memory", "11Gi", "4Gi", True),
        ("configmaps", "1", "1", False),
    ],
)
def test_two_revisions_need_a_quota_with_room_for_three(key: str, hard: str, used: str, refused: bool) -> None:
    assert bool(refusals(quotas=[quota(key, hard, used)])) is refused


def test_a_swap_needs_a_quota_with_room_for_two() -> None:
    assert not refusals(swap=True, quotas=[quota("requests.nvidia.com/gpu", "2", "1")])
    assert refusals(swap=True, quotas=[quota("requests.nvidia.com/gpu", "1", "1")])


def test_a_full_node_that_nothing_can_join_is_a_reason_to_swap() -> None:
    (said,) = refusals(nodes=[node()], node_pods=[user_of_a_gpu()])
    assert "No node has 1 nvidia.com/gpu free (gpu-1)" in said
    assert "--strategy swap" in said
    assert not refusals(swap=True, nodes=[node()], node_pods=[user_of_a_gpu()])


@pytest.mark.parametrize(
    "objects",
    [
        {"nodes": [node("2")], "node_pods": [user_of_a_gpu()]},
        {"nodes": [node(**{"karpenter.sh/nodepool": "gpu"})], "node_pods": [user_of_a_gpu()]},
        {"nodes": [], "node_pods": []},
        {"nodes": None, "node_pods": None},
    ],
    ids=["a free GPU", "a group that grows", "no GPU node yet", "no right to look"],
)
def test_what_may_still_get_a_gpu_is_not_refused(objects: Object) -> None:
    assert not refusals(**objects)
