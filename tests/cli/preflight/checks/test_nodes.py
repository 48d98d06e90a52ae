"""A node, and a GPU on it, is there for the pods of a release."""

from __future__ import annotations

import pytest

from mistral_cli.objects import Object
from mistral_cli.preflight.checks import nodes
from mistral_cli.preflight.checks.finding import State
from mistral_cli.preflight.observed import Answer, Observed
from tests.support.cluster_api import admission as cluster
from tests.support.preflight_checks import TARGET, named, release

pytestmark = pytest.mark.chart


def node_with_one_gpu(**labels: str) -> Object:
    node = cluster.node(labels, **{"nvidia.com/gpu": "1"})
    return {**node, "metadata": {**node["metadata"], "name": "gpu-1"}}


def test_the_releases_own_pod_does_not_count_against_its_gpu() -> None:
    own = cluster.gpu_pod("mistral")
    own["metadata"]["labels"] = {"serving.kserve.io/inferenceservice": "mistral-7b"}
    observed = Observed(nodes=Answer([node_with_one_gpu()]), pods=Answer([own]))
    finding = named(nodes.check(release(), observed, TARGET), "GPU")
    assert finding.state == State.OK
    assert "--strategy swap" in finding.what


def test_a_full_group_that_may_grow_cannot_be_judged() -> None:
    full = node_with_one_gpu(**{"karpenter.sh/nodepool": "gpu"})
    observed = Observed(nodes=Answer([full]), pods=Answer([cluster.gpu_pod()]))
    assert named(nodes.check(release(), observed, TARGET), "GPU").state == State.UNKNOWN


def test_a_label_that_an_autoscaler_knows_cannot_be_judged_without_a_node() -> None:
    other = {"metadata": {"name": "cpu-1"}, "status": {"allocatable": {"cpu": "4"}}}
    finding = named(nodes.check(release("karpenter"), Observed(nodes=Answer([other])), TARGET), "Nodes")
    assert finding.state == State.UNKNOWN


def test_a_release_without_a_gpu_asks_for_no_driver() -> None:
    allocatable = {"cpu": "4", "memory": "8Gi", "ephemeral-storage": "50Gi"}
    node = {"metadata": {"name": "n"}, "status": {"allocatable": allocatable}}
    found = nodes.check(release("minimal-cpu"), Observed(nodes=Answer([node])), TARGET)
    assert [finding.check for finding in found] == ["Nodes"]
