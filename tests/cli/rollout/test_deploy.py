"""`rollout deploy` on a cluster with KServe's traffic rule and Knative's latest-ready rule in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mistral_cli.rollout import verbs
from mistral_cli.rollout.lock import LockHeld, LockLost
from mistral_cli.rollout.planning import plan
from mistral_cli.rollout.planning.preconditions import Options, Refused
from mistral_cli.rollout.record import Progress
from mistral_cli.rollout.state.status import compute
from tests.support.cluster_api.api import Fault
from tests.support.cluster_api.knative import NAME, REVISIONS, SERVICE, Image
from tests.support.cluster_api.runs import NEW, OLD, Bench, bench

BAD = {
    "crashes": Image(crashes=True),
    "cannot be pulled": Image(pull_error='failed to pull image "x": manifest unknown'),
    "never gets ready": Image(hangs=True),
}


def patches(at: Bench) -> list[dict[str, Any]]:
    """Return the predictors of all patches that the service got."""
    return [
        body["spec"]["predictor"] for method, path, body in at.world.store.asked if (method, path) == ("PATCH", SERVICE)
    ]


def highest_share(at: Bench, image: str) -> int:
    return max(shares.get(image, 0) for shares in at.world.shares)


# A good image


def test_a_good_image_is_measured_at_every_step_and_promoted(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        assert at.deploy() == verbs.PROMOTED
        assert at.users() == {NEW: 100}
        assert at.verdicts.measured == [0, 10, 50]


def test_image_and_percent_travel_in_one_patch_with_the_rest_of_the_container(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.deploy()
        rehearsal, start, *shares = patches(at)
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
        assert patches(at) == []


def test_a_percent_of_100_before_the_rollout_is_put_back(tmp_path: Path) -> None:
    with bench(tmp_path, predictor={"canaryTrafficPercent": 100}) as at:
        assert at.deploy() == verbs.PROMOTED
        assert patches(at)[-1] == {"canaryTrafficPercent": 100}


# RolloutFailed images


@pytest.mark.parametrize("kind", BAD)
def test_an_image_that_does_not_start_never_meets_a_user(tmp_path: Path, kind: str) -> None:
    with bench(tmp_path, images={NEW: BAD[kind]}) as at:
        assert at.deploy() in (verbs.REVERTED, verbs.TIMED_OUT)
        assert at.users() == {OLD: 100}
        assert highest_share(at, NEW) == 0


@pytest.mark.parametrize("share", [0, 10, 50])
def test_users_meet_a_bad_image_at_most_at_the_share_where_the_gates_see_it(tmp_path: Path, share: int) -> None:
    with bench(tmp_path) as at:
        at.verdicts.fails_from[NEW] = share
        assert at.deploy() == verbs.REVERTED
        assert at.users() == {OLD: 100}
        assert highest_share(at, NEW) == share


@pytest.mark.parametrize("kind", BAD)
def test_a_failed_canary_gives_its_gpu_to_the_old_images_own_revision(tmp_path: Path, kind: str) -> None:
    """Two GPUs: without the deletion the old image's new revision would wait for a third one."""
    with bench(tmp_path, images={NEW: BAD[kind]}, gpus=2) as at:
        at.deploy()
        images = at.world.images_by_revision()
        assert NEW not in images.values()
        service = at.world.store.objects[SERVICE]
        assert "canaryTrafficPercent" not in service["spec"]["predictor"]
        assert service["status"]["components"]["predictor"]["latestRolledoutRevision"] == max(images)


def test_what_cannot_mend_itself_ends_the_rollout_long_before_its_deadline(tmp_path: Path) -> None:
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
        assert highest_share(at, NEW) == 0


# Refused before anything is touched


@pytest.mark.parametrize("quota", [1, 2])
def test_a_quota_without_room_for_three_pods_is_refused_before_anything_is_touched(tmp_path: Path, quota: int) -> None:
    with bench(tmp_path, quota=quota) as at:
        with pytest.raises(Refused, match="2 more pods need 2"):
            at.deploy()
        assert patches(at) == []


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
        by_hand(at, image="dev.local/mistral:other", percent=10)
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


# Somebody else at work


def by_hand(at: Bench, image: str, percent: int | None) -> None:
    """Change the service as kubectl would, and let the cluster act."""
    service = at.world.store.objects[SERVICE]
    changed = {**service["spec"]["predictor"], "containers": [{"name": "kserve-container", "image": image}]}
    changed.pop("canaryTrafficPercent", None)
    if percent is not None:
        changed["canaryTrafficPercent"] = percent
    at.world.store.put(SERVICE, {**service, "spec": {"predictor": changed}})
    for _ in range(10):
        at.world.tick()


def test_a_helm_upgrade_in_the_middle_is_noticed_and_the_old_image_ends_up_with_all_users(tmp_path: Path) -> None:
    """Without a percent the newest READY revision gets all: that is the canary, not the image that Helm names."""
    with bench(tmp_path) as at:
        at.verdicts.on_measure = lambda share: by_hand(at, OLD, None) if share == 10 else None
        assert at.deploy() == verbs.REVERTED
        assert at.users() == {OLD: 100}
        assert any("another writer changed" in line for line in at.logged)


def test_a_conflict_is_read_again_and_repeated(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.world.store.faults.append(Fault("PATCH", "inferenceservices", 409, "the object has been modified", times=0))
        at.verdicts.on_measure = lambda share: setattr(at.world.store.faults[0], "times", 2)
        assert at.deploy() == verbs.PROMOTED


def test_throttling_and_a_webhook_that_restarts_are_waited_out(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.world.store.faults += [
            Fault("GET", "revisions", 429, "too many requests", times=2),
            Fault("PATCH", "inferenceservices", 500, "failed calling webhook", times=1),
        ]
        assert at.deploy() == verbs.PROMOTED


def test_an_api_server_that_is_away_for_a_while_does_not_end_the_rollout(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        away = Fault("GET", "inferenceservices", 503, "connection refused", times=0)
        at.world.store.faults.append(away)
        at.verdicts.on_measure = lambda share: setattr(away, "times", 12)
        assert at.deploy() == verbs.PROMOTED
        assert any("does not answer" in line or "connection refused" in line for line in at.logged)


def test_rights_that_only_a_better_check_needs_may_be_missing(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.world.store.faults += [
            Fault("GET", part, 403, f'User "ci" cannot list {part}', times=10_000)
            for part in ("nodes", "events", "/log")
        ]
        assert at.deploy() == verbs.PROMOTED


# The lock


def test_two_rollouts_of_one_service_do_not_run_at_once(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.executor("runner-1").lock.acquire()
        with pytest.raises(LockHeld, match="runner-1 has the lock"):
            at.deploy(owner="runner-2")


def test_the_lock_of_a_runner_that_is_gone_expires(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.executor("runner-1").lock.acquire()
        for _ in range(30):
            at.world.tick()
        assert at.deploy(owner="runner-2") == verbs.PROMOTED


def test_a_runner_that_lost_its_lock_writes_nothing_more(tmp_path: Path) -> None:
    with bench(tmp_path) as at:

        def overtake(share: int) -> None:
            for _ in range(30):
                at.world.tick()
            at.executor("runner-2").lock.acquire()

        at.verdicts.on_measure = overtake
        with pytest.raises(LockLost, match="runner-2"):
            at.deploy()
        assert patches(at)[-1]["canaryTrafficPercent"] == 0


# One GPU


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
    with bench(tmp_path, gpus=1, images={NEW: BAD[kind]}) as at:
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
        assert highest_share(at, NEW) == 0


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


# Verbs for people


def test_start_step_promote_by_hand(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        assert verbs.start(at.executor(), Options(NEW, steps=(0,))) == verbs.DONE
        assert at.users() == {OLD: 100}
        assert verbs.step(at.executor(), 30, measure=False) == verbs.DONE
        assert at.users() == {OLD: 70, NEW: 30}
        assert verbs.promote(at.executor()) == verbs.PROMOTED
        assert at.users() == {NEW: 100}


def test_stop_takes_the_users_away_and_revert_the_image(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        verbs.start(at.executor(), Options(NEW, steps=(25,)))
        assert at.users() == {OLD: 75, NEW: 25}
        assert verbs.stop(at.executor()) == verbs.DONE
        assert at.users() == {OLD: 100}
        assert NEW in at.world.images_by_revision().values()
        assert verbs.revert_in_progress(at.executor()) == verbs.DONE
        assert NEW not in at.world.images_by_revision().values()


def test_revert_undoes_a_canary_that_helm_started(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        by_hand(at, "dev.local/mistral:other", 10)
        assert verbs.revert_in_progress(at.executor()) == verbs.DONE
        assert at.users() == {OLD: 100}


def test_a_verb_without_a_rollout_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at, pytest.raises(Refused, match="No rollout of mistral-7b is in progress"):
        verbs.promote(at.executor())


def test_history_keeps_how_rollouts_ended(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.verdicts.fails_from[NEW] = 0
        at.deploy()
        past = at.executor().lock.history()
        assert [(each["image"], each["progress"]) for each in past] == [(NEW, Progress.REVERTED)]
        assert "error_rate" in past[0]["reason"]
        assert compute(at.executor().reader.read()).stable is not None
