"""The verbs of `mistral rollout`. After any failure the old image has all the traffic again before a verb returns."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from mistral_cli.cluster import ClusterError
from mistral_cli.rollout.executor import Executor
from mistral_cli.rollout.planning import plan, preconditions
from mistral_cli.rollout.planning.abort import RolloutFailed, TimedOut
from mistral_cli.rollout.planning.changes import Share, Start
from mistral_cli.rollout.planning.goals import AllTrafficTo, NewestReady, TrafficSplit
from mistral_cli.rollout.planning.preconditions import CANARY, Options, Refused
from mistral_cli.rollout.record import Progress, Record, timestamp
from mistral_cli.rollout.state import knative
from mistral_cli.rollout.state.observed import STANDARD, Observed
from mistral_cli.rollout.state.status import Status

REVERT_S = 900.0
"""Seconds that a revert may take, all attempts together."""
REVERT_ATTEMPTS = 3

PROMOTED, REVERTED, TIMED_OUT, STUCK, DONE = "promoted", "reverted", "timed out", "stuck", "done"
EXIT_CODES = {PROMOTED: 0, DONE: 0, REVERTED: 1, TIMED_OUT: 4, STUCK: 5}


def deploy(executor: Executor, options: Options) -> str:
    """Bring the image to all users, or put the old one back.

    Raises:
        Refused: nothing was touched.
    """
    executor.record = executor.lock.record()
    if executor.record and executor.record.unfinished:
        if (outcome := _recover(executor, executor.record, options)) is not None:
            return outcome
    elif _already_serves(executor, options.image):
        return PROMOTED
    else:
        _prepare(executor, options)
    assert executor.record is not None
    observed, status = executor.refresh()
    executor.generation = observed.generation
    return _execute_or_revert(executor, plan.deploy(status, executor.record, options.steps))


def _recover(executor: Executor, record: Record, options: Options) -> str | None:
    """Finish what a killed runner left. Return None if its rollout goes on, or if this one has begun."""
    if record.progress == Progress.ROLLING and record.image == options.image:
        executor.log(f"Resuming the rollout of {record.image}, unfinished since {record.changed}.")
        return None
    executor.log(f"Reverting the rollout of {record.image}, unfinished since {record.changed}.")
    outcome = revert(executor, record.reason or "its runner ended")
    if outcome == STUCK or record.image == options.image:
        return outcome
    if _already_serves(executor, options.image):
        return PROMOTED
    _prepare(executor, options)
    return None


def _already_serves(executor: Executor, image: str) -> bool:
    _, status = executor.refresh()
    served = preconditions.settled(status) and status.stable is not None and status.stable.image == image
    if served:
        executor.log(f"{image} already has all the traffic.")
    return served


def _prepare(executor: Executor, options: Options) -> None:
    """Check the preconditions, and save the record before the first patch."""
    observed, status = executor.refresh(capacity=True)
    preconditions.check(observed, status, options)
    record = new_record(observed, status, options, executor.now())
    try:
        executor.try_patch(Start(options.image, 0))
    except ClusterError as error:
        raise Refused(f"The API server refuses the patch: {error}") from error
    executor.record = record
    executor.save_record()


def _execute_or_revert(executor: Executor, steps: Iterable[plan.Step]) -> str:
    """Execute the steps; revert if one fails."""
    try:
        executor.execute(steps)
        return PROMOTED
    except TimedOut as failure:
        return TIMED_OUT if revert(executor, str(failure)) == REVERTED else STUCK
    except (RolloutFailed, ClusterError) as failure:
        return revert(executor, str(failure))
    except KeyboardInterrupt:
        return revert(executor, "interrupted")


def revert(executor: Executor, reason: str) -> str:
    """Put the old image back and verify it."""
    assert executor.record is not None
    executor.log(f"Reverting: {reason}")
    executor.reverting = True
    for attempt in range(1, REVERT_ATTEMPTS + 1):
        executor.deadline_s = executor.clock() + REVERT_S / REVERT_ATTEMPTS
        executor.generation = None  # the old image comes back whatever another writer has changed
        try:
            executor.save_record(progress=Progress.REVERTING, reason=reason)
            _, status = executor.refresh()
            executor.execute(plan.revert(status, executor.record))
            executor.reverting = False
            return REVERTED
        except (RolloutFailed, ClusterError) as failure:
            executor.log(f"Attempt {attempt} of {REVERT_ATTEMPTS} to revert failed: {failure}")
    return STUCK


# Verbs for people, one change at a time


def start(executor: Executor, options: Options) -> str:
    """Start a new version beside the old one, without traffic, and wait until it is ready."""
    executor.record = executor.lock.record()
    if executor.record and executor.record.unfinished:
        raise Refused(f"A rollout of {executor.record.image} is unfinished: promote or revert it first.")
    _prepare(executor, options)
    assert executor.record is not None
    observed, _ = executor.refresh()
    executor.generation = observed.generation
    share = options.steps[0] if options.steps else 0
    outcome = _execute_or_revert(
        executor,
        [
            plan.Patch(Start(options.image, share), "image and traffic in one patch"),
            plan.WaitFor(NewestReady(options.image), "the service stays Ready on its old revision"),
            plan.WaitFor(TrafficSplit(share, executor.record.stable), "the traffic follows a patch by 2 to 10 s"),
        ],
    )
    return DONE if outcome == PROMOTED else outcome


def step(executor: Executor, percent: int, measure: bool) -> str:
    """Give the newest version this percentage, and measure it there."""
    record = _current_record(executor)
    steps: list[plan.Step] = [
        plan.Patch(Share(percent), "requested"),
        plan.WaitFor(TrafficSplit(percent, record.stable), "the status says what users get"),
    ]
    if measure:
        steps.append(plan.Measure(percent, "with users on it"))
    outcome = _execute_or_revert(executor, steps)
    return DONE if outcome == PROMOTED else outcome


def promote(executor: Executor) -> str:
    """Give the newest version all traffic, also the one of the old image with which a revert could not end."""
    record = _current_record(executor, same_image=True)
    return _execute_or_revert(executor, plan.promotion(executor.refresh()[1], record))


def stop(executor: Executor) -> str:
    """Give the newest version no traffic and leave it running."""
    record = _current_record(executor)
    try:
        executor.execute(
            [
                plan.Patch(Share(0), "requested"),
                plan.WaitFor(AllTrafficTo(record.previous_image), "users are on the old version"),
            ]
        )
    except (RolloutFailed, ClusterError) as failure:
        executor.log(f"{record.image} still has traffic: {failure}")
        return STUCK
    return DONE


def _current_record(executor: Executor, same_image: bool = False) -> Record:
    """Return the record of the rollout in progress, or make one for a canary that something else started.

    Raises:
        Refused: there is no rollout.
    """
    observed, status = executor.refresh()
    executor.record = executor.lock.record()
    if executor.record is None or not executor.record.unfinished:
        stable, candidate = status.stable, status.candidate
        if stable is None or candidate is None or (candidate.image == stable.image and not same_image):
            raise Refused(f"No rollout of {observed.name} is in progress: {status.describe()}")
        found = new_record(observed, status, Options(candidate.image, CANARY), executor.now())
        executor.record = found
        executor.save_record()
    executor.generation = observed.generation
    return executor.record


def revert_in_progress(executor: Executor) -> str:
    """Revert the rollout in progress. It was asked for, so success is exit code 0."""
    _current_record(executor)
    outcome = revert(executor, "requested by the operator")
    return DONE if outcome == REVERTED else outcome


def new_record(observed: Observed, status: Status, options: Options, now: datetime) -> Record:
    """Return the record of a rollout that starts from this status."""
    if status.stable is None:
        raise Refused(f"{observed.name} has no ready version yet, so there is nothing to revert to.")
    field = observed.predictor.get("canaryTrafficPercent")
    scale = (observed.predictor.get("annotations") or {}).get(knative.INITIAL_SCALE)
    return Record(
        image=options.image,
        previous_image=status.stable.image,
        stable=status.stable.name,
        percent=100 if field == 100 else None,
        initial_scale=None if observed.mode == STANDARD or scale == "0" else scale,
        strategy=options.strategy,
        progress=Progress.ROLLING,
        started=timestamp(now),
        changed=timestamp(now),
    )
