"""`mistral rollout deploy --strategy swap` under load, with one GPU in the cluster."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.e2e.cluster import Release
from tests.e2e.load import failures, under_load
from tests.e2e.test_rollout import FAULTY_IMAGE, PROMOTED, REVERTED, deploy

GPU = "nvidia.com/gpu"


@pytest.fixture(scope="module")
def on_one_gpu(make_release: Callable[[str], Release]) -> Release:
    """A release that holds the cluster's only GPU."""
    release = make_release("-swap")
    nodes = json.loads(release.kubectl("get", "nodes", "--output", "json"))["items"]
    gpus = sum(int(node["status"]["allocatable"].get(GPU, 0)) for node in nodes)
    if gpus != 1:
        pytest.skip(f"the cluster has {gpus} GPUs and not one; README.md says how a node can pretend to have one")
    release.install(settings={"gpu.count": "1", "cluster.knativeFlags[0]": "kubernetes.podspec-tolerations"})
    release.wait_until_ready()
    return release


def test_a_swap_on_the_only_gpu_loses_no_request(on_one_gpu: Release) -> None:
    image = on_one_gpu.other_image

    with under_load(on_one_gpu.target, clients=2) as answers:
        code, result = deploy(on_one_gpu, image, "--strategy", "swap", "--timeout", "12m")

    assert (code, result["result"]) == (PROMOTED, "promoted")
    assert failures(answers) == []
    assert on_one_gpu.image == image
    assert on_one_gpu.traffic == {on_one_gpu.newest_ready_revision: 100}


def test_a_bad_image_is_swapped_back_on_the_only_gpu(on_one_gpu: Release) -> None:
    good = on_one_gpu.image

    with under_load(on_one_gpu.target, clients=2) as answers:
        code, result = deploy(
            on_one_gpu, FAULTY_IMAGE.format(fault="nonsense"), "--strategy", "swap", "--timeout", "12m"
        )

    assert (code, result["result"]) == (REVERTED, "reverted")
    assert failures(answers) == []
    assert on_one_gpu.image == good
