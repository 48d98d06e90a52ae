"""Ends a wait that can no longer succeed: after a permanent fault, at a time limit, or when other traffic appears."""

from __future__ import annotations

from mistral_cli.rollout.state.observed import KNATIVE, Observed
from mistral_cli.rollout.state.status import Phase, Status

TRAFFIC_S = 120.0
"""Seconds within which the status must follow a patch of the traffic."""


class RolloutFailed(Exception):
    """The rollout must be reverted; `str(error)` has the reason."""


class TimedOut(RolloutFailed):
    """A step exceeded its time limit."""


def check_rollout(observed: Observed, status: Status, waited_s: float, gpu_wait_s: float) -> None:
    """Check a wait that brings traffic to the new version.

    Raises:
        RolloutFailed: the new version must be reverted.
    """
    if status.phase == Phase.FAILED:
        raise RolloutFailed(status.message)
    _check_progress_deadline(status, waited_s)
    if status.phase == Phase.SCHEDULING and status.scheduling_s > gpu_wait_s:
        raise TimedOut(f"no node for {status.scheduling_s:.0f} s (--gpu-wait): {status.message}")
    if status.phase in (Phase.SETTLING, Phase.READY, Phase.SPLIT) and waited_s > TRAFFIC_S:
        raise TimedOut(f"the traffic has not followed for {waited_s:.0f} s: {status.message}")
    known = {version.name for version in (status.stable, status.candidate) if version}
    if observed.mode == KNATIVE and (others := set(status.versions.shares) - known):
        raise RolloutFailed(
            f"traffic goes to {', '.join(sorted(others))}, which is neither the old nor the new revision"
        )


def check_revert(status: Status, waited_s: float, image: str | None) -> None:
    """Check a wait that takes the traffic from `image`, which may fail.

    KServe can count the new revision as rolled out while the revert begins. It would then keep the traffic.

    Raises:
        RolloutFailed: the revert must be planned again.
    """
    newest, stable = status.candidate, status.stable
    if status.phase == Phase.FAILED and (newest is None or newest.image != image):
        raise RolloutFailed(status.message)
    _check_progress_deadline(status, waited_s)
    if stable and stable.image == image and status.versions.desired_share == 0:
        raise RolloutFailed(f"{stable.name} was rolled out just before the revert")


def _check_progress_deadline(status: Status, waited_s: float) -> None:
    if waited_s > status.progress_deadline_s + 60:
        raise TimedOut(f"not ready after {waited_s:.0f} s, past the progress deadline: {status.message}")
