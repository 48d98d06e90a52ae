"""`rollout deploy`: a good image is promoted, and users meet a bad one at most at the share where it is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistral_cli.rollout import verbs
from mistral_cli.rollout.planning import plan
from mistral_cli.rollout.planning.preconditions import Options
from tests.support.cluster_api.knative import Image
from tests.support.cluster_api.kserve import SERVICE
from tests.support.cluster_api.runs import BROKEN, NEW, OLD, bench


def test_a_good_image_is_measured_at_every_step_and_promoted(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        assert at.deploy() == verbs.PROMOTED
        assert at.users() == {NEW: 100}
        assert at.verdicts.measured == [0, 10, 50]


def test_image_and_percent_travel_in_one_patch_with_the_rest_of_the_container(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.deploy()
        rehearsal, start, *shares = at.patches()
        assert rehearsal == start
        assert start["canaryTrafficPercent"] == 0
        (container,) = start["containers"]
        assert container["image"] == NEW
        assert container["env"] == [{"name": "MISTRAL_DTYPE", "value": "auto"}]
        assert shares == [{"canaryTrafficPercent": percent} for percent in (10, 50, None)]


def test_the_plan_that_is_printed_is_the_plan_that_is_done(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        executor = at.executor()
        observed, status = executor.refresh(capacity=True)
        record = verbs.new_record(observed, status, Options(NEW), at.now())
        printed = [plan.describe(step) for step in plan.deploy(status, record, (10, 50))]
        at.logged.clear()
        at.deploy()
        assert [line for line in at.logged if "  # " in line] == printed


def test_an_image_that_serves_already_needs_nothing(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        assert at.deploy(OLD) == verbs.PROMOTED
        assert at.patches() == []


def test_a_percent_of_100_before_the_rollout_is_put_back(tmp_path: Path) -> None:
    with bench(tmp_path, predictor={"canaryTrafficPercent": 100}) as at:
        assert at.deploy() == verbs.PROMOTED
        assert at.patches()[-1] == {"canaryTrafficPercent": 100}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_image_that_does_not_start_never_meets_a_user(tmp_path: Path, kind: str) -> None:
    with bench(tmp_path, images={NEW: BROKEN[kind]}) as at:
        assert at.deploy() in (verbs.REVERTED, verbs.TIMED_OUT)
        assert at.users() == {OLD: 100}
        assert at.highest_share(NEW) == 0


@pytest.mark.parametrize("share", [0, 10, 50])
def test_users_meet_a_bad_image_at_most_at_the_share_where_the_gates_see_it(tmp_path: Path, share: int) -> None:
    with bench(tmp_path) as at:
        at.verdicts.fails_from[NEW] = share
        assert at.deploy() == verbs.REVERTED
        assert at.users() == {OLD: 100}
        assert at.highest_share(NEW) == share


@pytest.mark.parametrize("kind", BROKEN)
def test_a_failed_canary_gives_its_gpu_to_the_old_images_own_revision(tmp_path: Path, kind: str) -> None:
    """Two GPUs: without the deletion the old image's new revision would wait for a third one."""
    with bench(tmp_path, images={NEW: BROKEN[kind]}, gpus=2) as at:
        at.deploy()
        images = at.world.images_by_revision()
        assert NEW not in images.values()
        service = at.world.store.objects[SERVICE]
        assert "canaryTrafficPercent" not in service["spec"]["predictor"]
        assert service["status"]["components"]["predictor"]["latestRolledoutRevision"] == max(images)


def test_an_image_that_crashes_ends_the_rollout_long_before_its_deadline(tmp_path: Path) -> None:
    with bench(tmp_path, images={NEW: Image(crashes=True)}) as at:
        at.deploy()
        assert at.elapsed_s < 120


def test_a_rollout_out_of_time_is_reverted(tmp_path: Path) -> None:
    with bench(tmp_path, images={NEW: Image(hangs=True)}) as at:
        assert at.deploy(timeout_s=60) == verbs.TIMED_OUT
        assert at.users() == {OLD: 100}


def test_a_rollout_that_finds_no_gpu_is_reverted(tmp_path: Path) -> None:
    with bench(tmp_path, gpus=1) as at:
        assert at.deploy() == verbs.TIMED_OUT
        assert at.users() == {OLD: 100}
        assert at.highest_share(NEW) == 0
