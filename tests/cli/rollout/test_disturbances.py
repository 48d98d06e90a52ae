"""A rollout survives other writers, throttling, an API server that is away, and missing rights."""

from __future__ import annotations

from pathlib import Path

from mistral_cli.rollout import verbs
from tests.support.cluster_api.api import Fault
from tests.support.cluster_api.knative import Image
from tests.support.cluster_api.runs import NEW, OLD, bench


def test_a_helm_upgrade_in_the_middle_is_noticed_and_the_old_image_ends_up_with_all_users(tmp_path: Path) -> None:
    """Without a percent the newest READY revision gets all: that is the canary, not the image that Helm names."""
    with bench(tmp_path) as at:
        at.verdicts.on_measure = lambda share: at.change_service(OLD, None) if share == 10 else None
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


def test_a_revert_succeeds_without_the_right_to_delete_the_failed_revision(tmp_path: Path) -> None:
    with bench(tmp_path, images={NEW: Image(crashes=True)}) as at:
        at.world.store.faults.append(Fault("DELETE", "revisions", 403, "cannot delete revisions", times=10_000))
        assert at.deploy() == verbs.REVERTED
        assert at.users() == {OLD: 100}
        assert any("keeps its pod and its GPU until the progress deadline" in line for line in at.logged)


def test_the_failed_revision_is_deleted_after_an_api_server_was_away(tmp_path: Path) -> None:
    with bench(tmp_path, images={NEW: Image(crashes=True)}) as at:
        at.world.store.faults.append(Fault("DELETE", "revisions", 503, "connection refused", times=7))
        assert at.deploy() == verbs.REVERTED
        assert NEW not in at.world.images_by_revision().values()
        assert not any("to revert failed" in line for line in at.logged)
