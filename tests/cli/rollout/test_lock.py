"""One runner at a time changes a service."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistral_cli.rollout import verbs
from mistral_cli.rollout.lock import LockHeld, LockLost
from tests.support.cluster_api.runs import bench


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
        assert at.patches()[-1]["canaryTrafficPercent"] == 0
