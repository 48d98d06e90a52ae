"""Plans a rollout: from a status and a record, the steps with their reasons. `--dry-run` prints the same steps."""

from __future__ import annotations

from dataclasses import dataclass

from mistral_cli.rollout.planning.changes import Change, Promote, Replace, Revert, Share, Start
from mistral_cli.rollout.planning.goals import (
    AllTrafficTo,
    Goal,
    HasReadyPod,
    NewestExists,
    NewestReady,
    OnlyImageExists,
    ReadyWithoutPod,
    RolledOut,
    StableReady,
    TrafficSplit,
)
from mistral_cli.rollout.planning.preconditions import SWAP
from mistral_cli.rollout.record import Progress, Record
from mistral_cli.rollout.state.observed import STANDARD
from mistral_cli.rollout.state.status import Status
from mistral_cli.rollout.state.versions import Version

SETTLE_S = 10.0
GATEWAY_FOLLOWS = "the gateway follows the HTTPRoute within seconds"


@dataclass(frozen=True)
class Patch:
    """Send one merge patch."""

    change: Change
    why: str


@dataclass(frozen=True)
class WaitFor:
    """Poll until the goal is met."""

    goal: Goal
    why: str
    settle_s: float = 0.0
    """Seconds that the goal must hold, because a slow controller could still undo it."""
    optional: bool = False
    """The rollout may end without reaching it: users are served as before."""


@dataclass(frozen=True)
class Measure:
    """Measure the newest version and compare it by the gates."""

    share: int
    why: str


@dataclass(frozen=True)
class MeasureStable:
    """Save the measurements of the old version, for a strategy in which only one version runs at a time."""

    why: str


@dataclass(frozen=True)
class ShortenWindow:
    """Shorten the scale-down window of a revision without traffic, so that its pods end at once."""

    version: str
    why: str


@dataclass(frozen=True)
class Wake:
    """Send one request that is held until a pod answers."""

    why: str


@dataclass(frozen=True)
class DeleteFailed:
    """Delete the failed revisions of this rollout, except the newest: Knative would create it again."""

    keep_image: str
    newer_than: str
    why: str


@dataclass(frozen=True)
class Finish:
    """Save how the rollout ended."""

    progress: Progress
    why: str


Step = Patch | WaitFor | Measure | MeasureStable | ShortenWindow | Wake | DeleteFailed | Finish


def describe(step: Step) -> str:
    """Return the line that shows a step."""
    match step:
        case Patch(change, why):
            return f"patch    {change}  # {why}"
        case WaitFor(goal, why):
            return f"wait     until {goal}  # {why}"
        case Measure(share, why):
            return f"measure  the gates at {share} %  # {why}"
        case MeasureStable(why):
            return f"measure  the stable version  # {why}"
        case ShortenWindow(version, why):
            return f"shorten  the scale-down window of {version}  # {why}"
        case Wake(why):
            return f"wake     one request, held until a pod answers  # {why}"
        case DeleteFailed(_, newer_than, why):
            return f"delete   failed revisions newer than {newer_than}, never the newest  # {why}"
        case Finish(progress, why):
            return f"record   {progress}  # {why}"


def deploy(status: Status, record: Record, steps: tuple[int, ...]) -> list[Step]:
    """Return the remaining steps of a rollout, from the current status."""
    if record.strategy == SWAP:
        return _swap(status, record)
    image = record.image
    if status.stable is not None and status.stable.image == image:
        return promotion(status, record)
    plan: list[Step] = []
    reached = _current_share(status, image)
    if reached == 100:
        return promotion(status, record)
    if reached is None:
        plan.append(Patch(Start(image, 0), f"one patch; users stay on {record.stable} until the gates have passed"))
        reached = 0
    plan.append(WaitFor(NewestReady(image), "the service stays Ready on its old revision, so Ready does not count"))
    plan.append(WaitFor(TrafficSplit(reached, record.stable), "the traffic follows a patch by 2 to 10 s"))
    plan.append(Measure(reached, "both revisions, at the same time, through the ingress"))
    for share in sorted(step for step in steps if step > reached):
        plan.append(Patch(Share(share), "every gate passed"))
        plan.append(WaitFor(TrafficSplit(share, record.stable), "the status shows the traffic split"))
        plan.append(Measure(share, "again, with users on it"))
    return plan + promotion(status, record)


def _current_share(status: Status, image: str) -> int | None:
    """Return the percentage that the spec gives to this image, or None if it names another image."""
    if status.versions.desired_image != image:
        return None
    return 100 if status.versions.desired_share is None else status.versions.desired_share


def promotion(status: Status, record: Record) -> list[Step]:
    """Return the last steps of a canary."""
    exchanged = status.candidate is None and status.stable is not None and status.stable.image == record.image
    return [
        *(_exchange(record.image, record) if status.mode == STANDARD and not exchanged else []),
        Patch(Promote(record.percent), "every gate passed at every step"),
        WaitFor(RolledOut(record.image), "KServe counts it as rolled out and may remove the old revision"),
        Finish(Progress.PROMOTED, "the next run starts from here"),
    ]


def _exchange(image: str, record: Record) -> list[Step]:
    """Return the steps that give the stable version of Standard mode another image while its canary serves."""
    return [
        Patch(Share(100), "the canary serves while the stable version restarts"),
        WaitFor(TrafficSplit(100, record.stable), GATEWAY_FOLLOWS, settle_s=SETTLE_S),
        Patch(Replace(image), "its pods restart on their own GPUs"),
        WaitFor(StableReady(image), "the model has loaded again"),
        *_without_traffic(record),
    ]


def _without_traffic(record: Record) -> list[Step]:
    """Return the steps after which a canary of Standard mode may be removed.

    KServe changes the HTTPRoute and deletes the pods in one pass, and a gateway follows the route later.
    """
    return [
        Patch(Share(0), "the canary's pods may go only when no request reaches them"),
        WaitFor(TrafficSplit(0, record.stable), GATEWAY_FOLLOWS, settle_s=SETTLE_S),
    ]


def _swap(status: Status, record: Record) -> list[Step]:
    image = record.image
    plan: list[Step] = []
    rolled_out = status.stable is not None and status.stable.image == image
    if not rolled_out and status.versions.desired_image != image:
        plan.append(MeasureStable("it no longer runs when the new revision can be measured"))
        plan.append(Patch(Start(image, 0, "0"), "a revision that is ready without a pod"))
    if not rolled_out:
        plan.append(WaitFor(ReadyWithoutPod(image), "if Knative does not allow it, the revision would wait for a GPU"))
        plan.append(ShortenWindow(record.stable, "it shortens the pause"))
    plan += [
        Patch(Promote(record.percent), "the pause begins: requests wait in Knative's activator, none is refused"),
        WaitFor(RolledOut(image), "the old revision drains and hands its GPU over"),
        Wake("the new revision must start even if no user calls"),
        WaitFor(HasReadyPod(), "the pause ends when the model has loaded"),
        Measure(100, "against the saved measurements of the old revision"),
        Finish(Progress.PROMOTED, "the next run starts from here"),
    ]
    return plan


def revert(status: Status, record: Record) -> list[Step]:
    """Return the steps that give the old image all the traffic and free the new one's GPU."""
    old, stable = record.previous_image, status.stable
    plan: list[Step]
    delete_failed = DeleteFailed(
        old, record.stable, "a revision that never became ready keeps its pod for the progress deadline"
    )
    if status.mode == STANDARD:
        candidate = status.candidate
        if stable is None or stable.image == old:
            plan = _without_traffic(record) if candidate is not None and candidate.share else []
        elif candidate is not None:
            plan = _exchange(old, record)
        else:
            plan = [Patch(Replace(old), "its pods restart"), WaitFor(StableReady(old), "the model has loaded again")]
        return [
            *plan,
            Patch(Revert(old, 0), "the canary is removed"),
            WaitFor(OnlyImageExists(old), "users are on the old version, and the new one's GPU is free"),
            Finish(Progress.REVERTED, "the next run starts from here"),
        ]
    if stable is not None and stable.image == old:
        scale = "0" if record.strategy == SWAP else record.initial_scale
        plan = [
            Patch(Revert(old, 0, scale), f"{stable.name} has all requests within seconds"),
            WaitFor(AllTrafficTo(old), "users are on the old revision"),
            WaitFor(NewestExists(old), "only a revision that is not the newest may be deleted", settle_s=SETTLE_S),
            delete_failed,
        ]
        if record.strategy == SWAP:
            plan.append(WaitFor(AllTrafficTo(old), "KServe may have counted the new revision as rolled out", SETTLE_S))
            plan.append(
                Finish(
                    Progress.REVERTED,
                    "the old revision never stopped",
                )
            )
            return plan
        plan += [
            WaitFor(
                NewestReady(old), "the old image's own revision, so that the next rollout starts clean", optional=True
            ),
            Patch(Promote(record.percent), "the field has its old value again"),
            WaitFor(RolledOut(old), "the status confirms it"),
            Finish(Progress.REVERTED, "the next run starts from here"),
        ]
        return plan
    scale = "0" if record.strategy == SWAP else record.initial_scale
    plan = [
        Patch(Revert(old, record.percent, scale), "the new revision counts as rolled out: 0 percent would keep it"),
        WaitFor(AllTrafficTo(old), "the old image has all requests again", SETTLE_S),
        delete_failed,
    ]
    if scale == "0":
        plan += [Wake("the pause ends when the old model has loaded"), WaitFor(HasReadyPod(), "it answers")]
    return [*plan, Finish(Progress.REVERTED, "the next run starts from here")]


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
