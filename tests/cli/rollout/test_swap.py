"""`rollout deploy --strategy swap`: one GPU moves from the old image to the new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistral_cli.rollout import verbs
from mistral_cli.rollout.planning.preconditions import Refused
from tests.support.cluster_api.knative import REVISIONS
from tests.support.cluster_api.kserve import NAME, SERVICE
from tests.support.cluster_api.runs import BROKEN, NEW, OLD, bench


def test_a_swap_moves_one_gpu_from_the_old_image_to_the_new_one(tmp_path: Path) -> None:
    with bench(tmp_path, gpus=1) as at:
        assert at.deploy(strategy="swap") == verbs.PROMOTED
        assert at.users() == {NEW: 100}
        assert at.verdicts.measured == [100]


def test_a_swap_shortens_the_old_revisions_window(tmp_path: Path) -> None:
    with bench(tmp_path, gpus=1) as at:
        at.deploy(strategy="swap")
        old = at.world.store.objects[f"{REVISIONS}/{NAME}-predictor-00001"]
        assert old["metadata"]["annotations"]["autoscaling.knative.dev/window"] == "6s"


@pytest.mark.parametrize("kind", ["crashes", "cannot be pulled"])
def test_a_swap_to_an_image_that_does_not_start_is_swapped_back(tmp_path: Path, kind: str) -> None:
    with bench(tmp_path, gpus=1, images={NEW: BROKEN[kind]}) as at:
        assert at.deploy(strategy="swap") == verbs.REVERTED
        assert at.users() == {OLD: 100}
        _, status = at.executor().refresh()
        assert status.running


def test_a_swap_to_an_image_that_fails_its_gates_is_swapped_back(tmp_path: Path) -> None:
    with bench(tmp_path, gpus=1) as at:
        at.verdicts.fails_from[NEW] = 100
        assert at.deploy(strategy="swap") == verbs.REVERTED
        assert at.users() == {OLD: 100}


def test_a_swap_where_the_cluster_drops_initial_scale_is_undone_before_users_notice(tmp_path: Path) -> None:
    with bench(tmp_path, gpus=1, initial_scale_zero=False) as at:
        assert at.deploy(strategy="swap") == verbs.REVERTED
        assert any("allow-zero-initial-scale" in line for line in at.logged)
        assert at.highest_share(NEW) == 0


def test_a_swap_needs_room_for_two_pods_in_the_quota(tmp_path: Path) -> None:
    with bench(tmp_path, gpus=1, quota=1) as at, pytest.raises(Refused, match="1 more pods need 1"):
        at.deploy(strategy="swap")
    with bench(tmp_path, gpus=1, quota=2) as at:
        assert at.deploy(strategy="swap") == verbs.PROMOTED


def test_a_canary_after_a_swap_starts_with_a_pod_again(tmp_path: Path) -> None:
    with bench(tmp_path, gpus=2) as at:
        at.deploy(strategy="swap")
        third = "dev.local/mistral:third"
        assert at.deploy(third) == verbs.PROMOTED
        annotations = at.world.store.objects[SERVICE]["spec"]["predictor"]["annotations"]
        assert "autoscaling.knative.dev/initial-scale" not in annotations
