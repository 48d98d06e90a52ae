"""A rollout that would fail or do harm is refused before the first patch."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistral_cli.rollout import verbs
from mistral_cli.rollout.planning.preconditions import Refused
from tests.support.cluster_api.api import Fault
from tests.support.cluster_api.kserve import SERVICE
from tests.support.cluster_api.runs import OLD, bench


@pytest.mark.parametrize("quota", [1, 2])
def test_a_quota_without_room_for_three_pods_is_refused_before_anything_is_touched(tmp_path: Path, quota: int) -> None:
    with bench(tmp_path, quota=quota) as at:
        with pytest.raises(Refused, match="2 more pods need 2"):
            at.deploy()
        assert at.patches() == []


def test_a_quota_of_three_pods_is_enough(tmp_path: Path) -> None:
    with bench(tmp_path, quota=3) as at:
        assert at.deploy() == verbs.PROMOTED


def test_a_tag_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at, pytest.raises(Refused, match="not a digest"):
        at.deploy("registry.example.com/mistral:latest")


def test_a_service_without_tag_routing_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.world.store.objects[SERVICE]["metadata"]["annotations"]["serving.kserve.io/enable-tag-routing"] = "false"
        with pytest.raises(Refused, match="revisions have no addresses"):
            at.deploy()


def test_a_canary_of_somebody_else_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.change_service(image="dev.local/mistral:other", percent=10)
        with pytest.raises(Refused, match="not stable"):
            at.deploy()


def test_a_patch_that_the_api_server_refuses_is_found_by_its_dry_run(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.world.store.faults.append(Fault("PATCH", "inferenceservices", 403, 'User "ci" cannot patch', times=9))
        with pytest.raises(Refused, match='User "ci" cannot patch'):
            at.deploy()
        assert at.users() == {OLD: 100}


def test_argo_cd_would_undo_the_patches_and_is_told_so(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        annotations = at.world.store.objects[SERVICE]["metadata"]["annotations"]
        annotations["argocd.argoproj.io/tracking-id"] = "mistral:serving.kserve.io/InferenceService:mistral/mistral-7b"
        with pytest.raises(Refused, match=r"Argo CD \(mistral\) owns .* --shared-ownership"):
            at.deploy()
        assert at.deploy(shared_ownership=True) == verbs.PROMOTED
