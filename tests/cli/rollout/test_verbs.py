"""The verbs for people: start, step, stop, promote and revert, and the history."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistral_cli.rollout import verbs
from mistral_cli.rollout.planning.preconditions import Options, Refused
from mistral_cli.rollout.record import Progress
from mistral_cli.rollout.state.status import compute
from tests.support.cluster_api.kserve import SERVICE
from tests.support.cluster_api.runs import NEW, OLD, bench


def test_start_step_and_promote_move_the_users_step_by_step(tmp_path: Path) -> None:
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
        at.change_service("dev.local/mistral:other", 10)
        assert verbs.revert_in_progress(at.executor()) == verbs.DONE
        assert at.users() == {OLD: 100}


def test_promote_ends_a_revert_that_stopped_before_its_own_revision_was_ready(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.change_service(NEW, 0)
        at.change_service(OLD, 0)
        newest = list(at.world.images_by_revision())[-1]
        assert verbs.promote(at.executor()) == verbs.PROMOTED
        assert "canaryTrafficPercent" not in at.world.store.objects[SERVICE]["spec"]["predictor"]
        assert [target["revisionName"] for target in at.world.route if target["percent"]] == [newest]


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
