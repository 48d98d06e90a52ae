"""A status and options in, the steps of a rollout out, each with its reason. `--dry-run` prints what `run` executes."""

from __future__ import annotations

from dataclasses import dataclass

from .admission import SWAP
from .changes import Change, Promote, Revert, Share, Start
from .goals import Alone, Awake, Goal, NewestExists, NewestReady, OnlyImage, Parked, RolledOut, Split
from .observed import STANDARD
from .record import Progress, Record
from .status import Status
from .versions import Version

SETTLE_S = 10.0


@dataclass(frozen=True)
class Patch:
    """Send one merge patch."""

    change: Change
    why: str


@dataclass(frozen=True)
class Await:
    """Poll until the goal is met."""

    goal: Goal
    why: str
    settle_s: float = 0.0
    """How long the goal must hold: controllers that are behind could still undo it."""
    optional: bool = False
    """Not reaching it leaves users as well served as before."""


@dataclass(frozen=True)
class Measure:
    """Judge the newest version by the gates."""

    share: int
    why: str


@dataclass(frozen=True)
class MeasureStable:
    """Keep figures of the old version, for a strategy in which both never run at once."""

    why: str


@dataclass(frozen=True)
class Shorten:
    """Let a revision that has lost its traffic end its pods without waiting out its window."""

    version: str
    why: str


@dataclass(frozen=True)
class Wake:
    """Send one request that is held until a pod answers."""

    why: str


@dataclass(frozen=True)
class DeleteFailed:
    """Delete revisions that this rollout made, never the newest: it would come back."""

    keep_image: str
    newer_than: str
    why: str


@dataclass(frozen=True)
class Finish:
    """Write down how the rollout ended."""

    progress: Progress
    why: str


Step = Patch | Await | Measure | MeasureStable | Shorten | Wake | DeleteFailed | Finish


def describe(step: Step) -> str:
    """Return the line of a step for people."""
    match step:
        case Patch(change, why):
            return f"patch    {change}  # {why}"
        case Await(goal, why):
            return f"wait     until {goal}  # {why}"
        case Measure(share, why):
            return f"measure  the gates at {share} %  # {why}"
        case MeasureStable(why):
            return f"measure  the stable version  # {why}"
        case Shorten(version, why):
            return f"shorten  the scale-down window of {version}  # {why}"
        case Wake(why):
            return f"wake     one request, held until a pod answers  # {why}"
        case DeleteFailed(_, newer_than, why):
            return f"delete   failed revisions newer than {newer_than}, never the newest  # {why}"
        case Finish(progress, why):
            return f"record   {progress}  # {why}"


def deploy(status: Status, record: Record, steps: tuple[int, ...]) -> list[Step]:
    """Return what is left to do of a rollout, from wherever the service stands now."""
    if record.strategy == SWAP:
        return _swap(status, record)
    image = record.image
    if status.stable is not None and status.stable.image == image:
        return promotion(record)
    plan: list[Step] = []
    reached = _share_reached(status, image)
    if reached == 100:
        return promotion(record)
    if reached is None:
        plan.append(Patch(Start(image, 0), f"one patch; users stay on {record.stable} until the gates have seen it"))
        reached = 0
    plan.append(Await(NewestReady(image), "the service stays Ready on its old revision, so its Ready says nothing"))
    plan.append(Await(Split(reached, record.stable), "the traffic follows a patch by 2 to 10 s"))
    plan.append(Measure(reached, "both revisions, at the same time, through the ingress"))
    for share in sorted(step for step in steps if step > reached):
        plan.append(Patch(Share(share), "every gate passed"))
        plan.append(Await(Split(share, record.stable), "the status says what users get"))
        plan.append(Measure(share, "again with users on it"))
    return plan + promotion(record)


def _share_reached(status: Status, image: str) -> int | None:
    """Return what the spec gives to this image already; None when it does not ask for it."""
    if status.versions.wished_image != image:
        return None
    return 100 if status.versions.wished_share is None else status.versions.wished_share


def promotion(record: Record) -> list[Step]:
    """Return the last steps of a canary."""
    return [
        Patch(Promote(record.percent), "every gate passed at every step"),
        Await(RolledOut(record.image), "KServe counts it as rolled out, and the old revision may go"),
        Finish(Progress.PROMOTED, "the next run has nothing to mend"),
    ]


def _swap(status: Status, record: Record) -> list[Step]:
    image = record.image
    plan: list[Step] = []
    rolled_out = status.stable is not None and status.stable.image == image
    if not rolled_out and status.versions.wished_image != image:
        plan.append(MeasureStable("it will be gone when the new revision can be measured"))
        plan.append(Patch(Start(image, 0, "0"), "a revision that is ready without a pod"))
    if not rolled_out:
        plan.append(
            Await(Parked(image), "where the cluster does not allow it, the revision would wait for a GPU for ever")
        )
        plan.append(Shorten(record.stable, "the pause becomes shorter by its scale-down window"))
    plan += [
        Patch(Promote(record.percent), "the pause begins: requests wait in Knative's activator, none is refused"),
        Await(RolledOut(image), "the old revision drains and hands its GPU over"),
        Wake("also without users the new revision must be seen to run"),
        Await(Awake(), "the pause ends when the model has loaded"),
        Measure(100, "against the figures of the old revision"),
        Finish(Progress.PROMOTED, "the next run has nothing to mend"),
    ]
    return plan


def revert(status: Status, record: Record) -> list[Step]:
    """Return how the old image gets all the traffic again and the new one's GPU comes free."""
    old, stable = record.previous_image, status.stable
    freed = DeleteFailed(
        old, record.stable, "a revision that never became ready keeps its pod for the progress deadline"
    )
    if status.mode == STANDARD:
        return [
            Patch(Revert(old, 0), "the stable Deployment was never touched"),
            Await(Alone(old), "users are on the old version, and the new one's GPU is free"),
            Finish(Progress.REVERTED, "the next run has nothing to mend"),
        ]
    if stable is not None and stable.image == old:
        scale = "0" if record.strategy == SWAP else record.initial_scale
        plan: list[Step] = [
            Patch(Revert(old, 0, scale), f"{stable.name} has all requests within seconds"),
            Await(OnlyImage(old), "users are on the old revision"),
            Await(NewestExists(old), "only a revision that is not the newest may be deleted", settle_s=SETTLE_S),
            freed,
        ]
        if record.strategy == SWAP:
            plan.append(Await(OnlyImage(old), "KServe may have counted the new revision as rolled out", SETTLE_S))
            plan.append(Finish(Progress.REVERTED, "the old revision never stopped; its copy stays without a pod"))
            return plan
        plan += [
            Await(
                NewestReady(old), "the old image's own revision, so that the next rollout starts clean", optional=True
            ),
            Patch(Promote(record.percent), "the field is as it was before"),
            Await(RolledOut(old), "the status says so"),
            Finish(Progress.REVERTED, "the next run has nothing to mend"),
        ]
        return plan
    scale = "0" if record.strategy == SWAP else record.initial_scale
    plan = [
        Patch(Revert(old, record.percent, scale), "the new revision counts as rolled out: 0 percent would keep it"),
        Await(OnlyImage(old), "the old image has all requests again", SETTLE_S),
        freed,
    ]
    if scale == "0":
        plan += [Wake("the pause ends when the old model has loaded"), Await(Awake(), "it answers")]
    return [*plan, Finish(Progress.REVERTED, "the next run has nothing to mend")]


def failed_revisions(status: Status, step: DeleteFailed) -> list[str]:
    """Return the revisions that `DeleteFailed` may delete now."""
    *older, _ = status.versions.all or (Version("", "", False),)
    names = [version.name for version in older]
    begin = names.index(step.newer_than) + 1 if step.newer_than in names else len(names)
    return [
        version.name
        for version in older[begin:]
        if version.image != step.keep_image and not version.share and version != status.stable
    ]
