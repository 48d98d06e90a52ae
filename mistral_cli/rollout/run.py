"""The verbs of `mistral rollout`. Whatever goes wrong, the old image has all the traffic again before one returns."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from ..cluster import ClusterError
from . import admission, knative, plan
from .act import Actor, Bad, TimedOut
from .admission import CANARY, Options, Refused
from .changes import Share, Start
from .goals import NewestReady, OnlyImage, Split
from .observed import STANDARD, Observed
from .record import Progress, Record, timestamp
from .status import Status

REVERT_S = 900.0
"""How long a revert may take before it says what stands where."""
REVERT_ATTEMPTS = 3

PROMOTED, REVERTED, TIMED_OUT, STUCK, DONE = "promoted", "reverted", "timed out", "stuck", "done"
EXIT_CODES = {PROMOTED: 0, DONE: 0, REVERTED: 1, TIMED_OUT: 4, STUCK: 5}


def deploy(actor: Actor, options: Options) -> str:
    """Bring the image to all users, or put the old one back.

    Raises:
        Refused: nothing was touched.
    """
    actor.record = actor.lock.record()
    if actor.record and actor.record.unfinished:
        if (outcome := _mend(actor, actor.record, options)) is not None:
            return outcome
    elif _serves(actor, options.image):
        return PROMOTED
    else:
        _begin(actor, options)
    assert actor.record is not None
    observed, status = actor.look()
    actor.generation = observed.generation
    return _forward(actor, plan.deploy(status, actor.record, options.steps))


def _mend(actor: Actor, record: Record, options: Options) -> str | None:
    """Finish what a killed runner left; None: its rollout goes on, or this one's has begun."""
    if record.progress == Progress.ROLLING and record.image == options.image:
        actor.say(f"The rollout of {record.image} that was left unfinished at {record.changed} goes on.")
        return None
    actor.say(f"The rollout of {record.image} that was left unfinished at {record.changed} is undone.")
    outcome = revert(actor, record.reason or "its runner ended")
    if outcome == STUCK or record.image == options.image:
        return outcome
    if _serves(actor, options.image):
        return PROMOTED
    _begin(actor, options)
    return None


def _serves(actor: Actor, image: str) -> bool:
    _, status = actor.look()
    served = admission.settled(status) and status.stable is not None and status.stable.image == image
    if served:
        actor.say(f"{image} has all the traffic already.")
    return served


def _begin(actor: Actor, options: Options) -> None:
    """Check, and write the record before the first patch."""
    observed, status = actor.look(capacity=True)
    admission.check(observed, status, options)
    record = begin(observed, status, options, actor.now())
    try:
        actor.rehearse(Start(options.image, 0))
    except ClusterError as error:
        raise Refused(f"The API server refuses the patch: {error}") from error
    actor.record = record
    actor.note()


def _forward(actor: Actor, steps: Iterable[plan.Step]) -> str:
    """Take the steps; undo everything when one fails."""
    try:
        actor.take(steps)
        return PROMOTED
    except TimedOut as bad:
        return TIMED_OUT if revert(actor, str(bad)) == REVERTED else STUCK
    except (Bad, ClusterError) as bad:
        return revert(actor, str(bad))
    except KeyboardInterrupt:
        return revert(actor, "it was interrupted")


def revert(actor: Actor, reason: str) -> str:
    """Put the old image back and verify it."""
    assert actor.record is not None
    actor.say(f"Reverting: {reason}")
    actor.reverting = True
    for attempt in range(1, REVERT_ATTEMPTS + 1):
        actor.deadline_s = actor.clock() + REVERT_S / REVERT_ATTEMPTS
        actor.generation = None  # whatever somebody else wrote meanwhile, the old image comes back
        try:
            actor.note(progress=Progress.REVERTING, reason=reason)
            _, status = actor.look()
            actor.take(plan.revert(status, actor.record))
            actor.reverting = False
            return REVERTED
        except (Bad, ClusterError) as bad:
            actor.say(f"Attempt {attempt} of {REVERT_ATTEMPTS} to revert failed: {bad}")
    return STUCK


# Verbs for people, one change at a time


def start(actor: Actor, options: Options) -> str:
    """Bring a new version up beside the old one, without users; wait until it is ready."""
    actor.record = actor.lock.record()
    if actor.record and actor.record.unfinished:
        raise Refused(f"A rollout of {actor.record.image} is unfinished: promote or revert it first.")
    _begin(actor, options)
    assert actor.record is not None
    observed, _ = actor.look()
    actor.generation = observed.generation
    share = options.steps[0] if options.steps else 0
    outcome = _forward(
        actor,
        [
            plan.Patch(Start(options.image, share), "image and traffic in one patch"),
            plan.Await(NewestReady(options.image), "the service stays Ready on its old revision"),
            plan.Await(Split(share, actor.record.stable), "the traffic follows a patch by 2 to 10 s"),
        ],
    )
    return DONE if outcome == PROMOTED else outcome


def step(actor: Actor, percent: int, measure: bool) -> str:
    """Give the newest version this share, and measure it there."""
    record = _adopt(actor)
    steps: list[plan.Step] = [
        plan.Patch(Share(percent), "asked for"),
        plan.Await(Split(percent, record.stable), "the status says what users get"),
    ]
    if measure:
        steps.append(plan.Measure(percent, "with users on it"))
    outcome = _forward(actor, steps)
    return DONE if outcome == PROMOTED else outcome


def promote(actor: Actor) -> str:
    """Give the newest version all traffic."""
    record = _adopt(actor)
    return _forward(actor, plan.promotion(record))


def stop(actor: Actor) -> str:
    """Take users off the newest version and leave it running."""
    record = _adopt(actor)
    try:
        actor.take(
            [
                plan.Patch(Share(0), "asked for"),
                plan.Await(OnlyImage(record.previous_image), "users are on the old version"),
            ]
        )
    except (Bad, ClusterError) as bad:
        actor.say(f"Users are not off {record.image} yet: {bad}")
        return STUCK
    return DONE


def _adopt(actor: Actor) -> Record:
    """Return the record of the rollout in progress, or make one for a canary that something else started.

    Raises:
        Refused: there is no rollout.
    """
    observed, status = actor.look()
    actor.record = actor.lock.record()
    if actor.record is None or not actor.record.unfinished:
        if status.candidate is None or status.stable is None or status.candidate.image == status.stable.image:
            raise Refused(f"No rollout of {observed.name} is in progress: {status.describe()}")
        found = begin(observed, status, Options(status.candidate.image, CANARY), actor.now())
        actor.record = found
        actor.note()
    actor.generation = observed.generation
    return actor.record


def revert_in_progress(actor: Actor) -> str:
    """Undo the rollout in progress; asked for, so its success is no failure."""
    _adopt(actor)
    outcome = revert(actor, "asked for")
    return DONE if outcome == REVERTED else outcome


def begin(observed: Observed, status: Status, options: Options, now: datetime) -> Record:
    """Return the record of a rollout that starts from this status."""
    if status.stable is None:
        raise Refused(f"{observed.name} has no ready version yet: there is nothing to go back to.")
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
