"""A wait ends as soon as its goal can no longer be reached, and no earlier."""

from __future__ import annotations

import pytest

from mistral_cli.rollout.planning import abort
from mistral_cli.rollout.planning.abort import RolloutFailed, TimedOut
from mistral_cli.rollout.state.observed import Observed
from mistral_cli.rollout.state.status import Phase, compute
from tests.support.cluster_api.objects import NEW, OLD, R1, R2, R3, container, observed, pod, revision, service

BACK_OFF = {"reason": "CrashLoopBackOff", "message": "back-off"}
ENDED = {"exitCode": 1, "reason": "Error", "message": "bad weights"}
CRASHED = [pod(R2, containers=[container(restarts=5, waiting=BACK_OFF, ended=ENDED)])]
BOTH = [revision(R1, OLD), revision(R2, NEW)]


def check_rollout(at: Observed, waited_s: float = 0) -> None:
    abort.check_rollout(at, compute(at), waited_s, gpu_wait_s=60)


def test_a_crash_of_the_new_image_ends_its_rollout_and_not_its_revert() -> None:
    at = observed(pods=CRASHED)
    assert compute(at).phase == Phase.FAILED
    with pytest.raises(RolloutFailed, match="bad weights"):
        check_rollout(at)
    abort.check_revert(compute(at), 0, NEW)


def test_a_crash_of_another_image_ends_a_revert() -> None:
    with pytest.raises(RolloutFailed, match="bad weights"):
        abort.check_revert(compute(observed(pods=CRASHED)), 0, OLD)


@pytest.mark.parametrize(("scheduling_s", "ends"), [(59, False), (61, True)])
def test_a_rollout_waits_for_a_gpu_as_long_as_gpu_wait_says(scheduling_s: float, ends: bool) -> None:
    at = observed(pods=[pod(R2, scheduled_ago=scheduling_s)])
    if ends:
        with pytest.raises(TimedOut, match="--gpu-wait"):
            check_rollout(at)
    else:
        check_rollout(at)


def test_traffic_that_does_not_follow_a_patch_ends_a_rollout() -> None:
    at = observed(service(percent=10, ready=R2, traffic={R1: 90, R2: 10}), revisions=BOTH)
    assert compute(at).phase == Phase.SPLIT
    check_rollout(at, abort.TRAFFIC_S)
    with pytest.raises(TimedOut, match="the traffic has not followed"):
        check_rollout(at, abort.TRAFFIC_S + 1)


def test_traffic_to_a_third_revision_ends_a_rollout() -> None:
    at = observed(service(percent=10, traffic={R1: 90, R3: 10}), revisions=[*BOTH, revision(R3, "other")])
    with pytest.raises(RolloutFailed, match=f"traffic goes to {R3}"):
        check_rollout(at)


def test_a_revert_ends_when_the_new_image_was_rolled_out_before_it() -> None:
    at = observed(service(percent=0, ready=R2, rolled_out=R2, traffic={R2: 100}), revisions=BOTH)
    with pytest.raises(RolloutFailed, match=f"{R2} was rolled out just before the revert"):
        abort.check_revert(compute(at), 0, NEW)


def test_a_wait_past_the_progress_deadline_ends() -> None:
    at = observed()
    with pytest.raises(TimedOut, match="past the progress deadline"):
        check_rollout(at, compute(at).progress_deadline_s + 61)
