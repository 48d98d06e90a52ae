"""Takes the steps of a plan, one after another, and ends a wait that cannot be rewarded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, TypeVar

from ..cluster import INFERENCE_SERVICE, REVISION, Conflict, Kind, Object, Rejected, Unreachable
from ..exit_codes import Failure
from . import changes, drift, knative, plan
from .gates import Judgement, line
from .goals import Goal, Parked
from .lock import Lock, Lost
from .observed import KNATIVE, Observed
from .reader import Reader
from .record import Progress, Record
from .status import Phase, Status, compute

T = TypeVar("T")

TRAFFIC_S = 120.0
"""How long the status may take to follow a patch of the traffic."""
PAUSE_S = 45.0
"""The seconds that a swap takes in addition to loading the model."""


class Bad(Exception):
    """The new version is not to be kept; `str(error)` says why."""


class TimedOut(Bad):
    """It was not ready, or not judged, in time."""


class Patcher(Protocol):
    """The operations of a cluster that the actions need."""

    def merge(
        self, kind: Kind, namespace: str, name: str, patch: Object, *, manager: str, dry_run: bool = False
    ) -> Object: ...
    def delete(self, kind: Kind, namespace: str, name: str) -> None: ...


class Judge(Protocol):
    """What measuring needs: the status says where the versions answer."""

    def baseline(self, status: Status) -> dict[str, Any]: ...
    def judge(self, status: Status, share: int, baseline: dict[str, Any] | None) -> list[Judgement]: ...
    def wake(self, status: Status) -> None: ...


@dataclass
class Actor:
    """One command's work on one InferenceService, under its lock."""

    cluster: Patcher
    reader: Reader
    lock: Lock
    judge: Judge
    say: Callable[[str], None]
    now: Callable[[], datetime]
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    deadline_s: float
    """Of `clock`: when the work must be over."""
    gpu_wait_s: float = 600.0
    poll_s: float = 2.0
    record: Record | None = None
    generation: int | None = None
    """Of the spec as this run read or left it; another one is somebody else's. None: whatever is there."""
    judgements: list[Judgement] = field(default_factory=list)
    lost: threading.Event = field(default_factory=threading.Event)
    reverting: bool = False
    _shown: str = ""

    def take(self, steps: Iterable[plan.Step]) -> None:
        """Take the steps in order.

        Raises:
            Bad: the new version must not be kept, or this took too long.
            ClusterError: the API server refused.
            Lost: another runner has the lock.
        """
        for step in steps:
            self._still_mine()
            self.say(plan.describe(step))
            match step:
                case plan.Patch(change, _):
                    self.patch(change)
                case plan.Await(goal, _, settle_s, optional):
                    if not self._await(goal, settle_s, optional):
                        return
                case plan.Measure(share, _):
                    self._measure(share)
                case plan.MeasureStable(_):
                    self._measure_stable()
                case plan.Shorten(version, _):
                    self._shorten(version)
                case plan.Wake(_):
                    self._wake()
                case plan.DeleteFailed():
                    self._delete_failed(step)
                case plan.Finish(progress, _):
                    self.note(progress=progress)

    def look(self, *, capacity: bool = False) -> tuple[Observed, Status]:
        """Read the cluster, compute the status, and show it when it changed."""
        observed = self._patiently(lambda: self.reader.read(capacity=capacity))
        status = compute(observed, self.record.changed_at if self.record else None)
        if status.describe() != self._shown:
            self._shown = status.describe()
            self.say(f"  {self._shown}")
        return observed, status

    def note(self, **fields: Any) -> None:
        """Write the record down with these fields."""
        assert self.record is not None
        self.record = self.record.at(self.now(), **fields)
        self._patiently(lambda: self.lock.write(self.record))  # type: ignore[arg-type]

    def patch(self, change: changes.Change) -> None:
        """Send one merge patch, on the object as it was read: a conflict means that it must be read again."""
        if self.record is not None:
            self.note()
        while True:
            observed = self._patiently(self.reader.read)
            self._own_generation(observed)
            body = changes.patch(change, observed)
            body["metadata"] = {"resourceVersion": observed.service["metadata"]["resourceVersion"]}
            try:
                answer = self.cluster.merge(
                    INFERENCE_SERVICE, observed.namespace, observed.name, body, manager=drift.MANAGER
                )
                self.generation = answer["metadata"].get("generation")
                return
            except Conflict as error:
                self._in_time(str(error))
            except Unreachable as error:
                self._in_time(str(error))
                self.generation = None  # it may have arrived; then the next one changes nothing
            self.sleep(self.poll_s / 4)

    def rehearse(self, change: changes.Change) -> None:
        """Have the API server try a patch without keeping it: rights, schema and webhooks speak before anything moves.

        Raises:
            ClusterError: it refused.
        """
        observed = self._patiently(self.reader.read)
        body = changes.patch(change, observed)
        name, namespace = observed.name, observed.namespace
        self.cluster.merge(INFERENCE_SERVICE, namespace, name, body, manager=drift.MANAGER, dry_run=True)

    def _await(self, goal: Goal, settle_s: float, optional: bool) -> bool:
        """Poll until the goal has held long enough; False when an optional one is out of reach."""
        begun_s, met_s = self.clock(), None
        while True:
            self._still_mine()
            observed, status = self.look()
            met_s = (met_s if met_s is not None else self.clock()) if goal.met(status) else None
            if met_s is not None and self.clock() - met_s >= settle_s:
                return True
            if met_s is None:
                try:
                    self._may_still_come(observed, status, self.clock() - begun_s)
                    if isinstance(goal, Parked) and (said := goal.out_of_reach(status)):
                        raise Bad(said)
                    self._in_time(f"still waiting until {goal}: {status.message}")
                except Bad as bad:
                    if not optional:
                        raise
                    serving = " and ".join(status.versions.shares)
                    self.say(f"Left as it is: {serving} serves all users; not reached: {goal} ({bad}).")
                    self.note(progress=Progress.REVERTED)
                    return False
            self.sleep(self.poll_s)

    def _may_still_come(self, observed: Observed, status: Status, waited_s: float) -> None:
        """End a wait that cannot be rewarded.

        Raises:
            Bad: the cause does not mend itself, somebody else changed the spec, or the time is up.
        """
        self._own_generation(observed)
        if status.phase == Phase.FAILED and not self._is_being_undone(status):
            raise Bad(status.message)
        if waited_s > status.progress_deadline_s + 60:
            raise TimedOut(f"not there {waited_s:.0f} s later, past the progress deadline: {status.message}")
        if self.reverting:
            self._has_not_overtaken(status)
            return
        if status.phase == Phase.SCHEDULING and status.scheduling_s > self.gpu_wait_s:
            raise TimedOut(f"no node for {status.scheduling_s:.0f} s (--gpu-wait): {status.message}")
        if status.phase in (Phase.SETTLING, Phase.READY, Phase.SPLIT) and waited_s > TRAFFIC_S:
            raise TimedOut(f"the traffic has not followed for {waited_s:.0f} s: {status.message}")
        known = {version.name for version in (status.stable, status.candidate) if version}
        if observed.mode == KNATIVE and (strays := set(status.versions.shares) - known):
            raise Bad(f"traffic goes to {', '.join(sorted(strays))}, which is neither the old nor the new revision")

    def _has_not_overtaken(self, status: Status) -> None:
        """End a revert at 0 percent when KServe counts the new revision as rolled out meanwhile: it would keep all.

        Raises:
            Bad: the revert must be planned anew.
        """
        stable, record = status.stable, self.record
        if record and stable and stable.image == record.image and status.versions.wished_share == 0:
            raise Bad(f"{stable.name} was rolled out just before the revert")

    def _is_being_undone(self, status: Status) -> bool:
        """Tell whether a revert meets the new image's failure, which is no reason to stop."""
        newest = status.candidate
        return self.reverting and newest is not None and self.record is not None and newest.image == self.record.image

    def _measure(self, share: int) -> None:
        """Judge until every gate has data.

        Raises:
            Bad: a gate failed.
        """
        while True:
            self._still_mine()
            observed, status = self.look()
            self._may_still_come(observed, status, 0)
            try:
                found = self.judge.judge(status, share, self.record.baseline if self.record else None)
            except Failure as failure:
                raise Bad(f"the gates cannot be measured: {failure}") from failure
            self.judgements = found
            for judgement in found:
                self.say(f"  {line(judgement)}")
            if failed := [judgement for judgement in found if judgement.passed is False]:
                raise Bad("; ".join(line(judgement) for judgement in failed))
            if all(judgement.passed for judgement in found):
                return
            self._in_time("gates without data: " + ", ".join(j.name for j in found if j.passed is None))
            self.sleep(2 * self.poll_s)

    def _measure_stable(self) -> None:
        try:
            self.note(baseline=self.judge.baseline(self.look()[1]))
        except Failure as failure:
            raise Bad(f"the gates cannot be measured: {failure}") from failure

    def _wake(self) -> None:
        """Send the request beside the polling, which sees what keeps the pod from coming."""
        status = self.look()[1]
        threading.Thread(target=self.judge.wake, args=(status,), name="wake", daemon=True).start()

    def _shorten(self, version: str) -> None:
        observed, _ = self.look()
        self.say(f"  Requests will wait for the model's load time plus about {PAUSE_S:.0f} s; none is refused.")
        try:
            self.cluster.merge(REVISION, observed.namespace, version, knative.window_patch(), manager=drift.MANAGER)
        except Rejected as error:
            self.say(f"  The pause will be longer by the scale-down window: {error}")

    def _delete_failed(self, step: plan.DeleteFailed) -> None:
        observed, status = self.look()
        for name in plan.failed_revisions(status, step):
            self.say(f"  deleting {name}")
            self.cluster.delete(REVISION, observed.namespace, name)

    def _still_mine(self) -> None:
        if self.lost.is_set():
            raise Lost("Another runner has taken the lock: nothing more was done.")

    def _own_generation(self, observed: Observed) -> None:
        if self.generation is not None and observed.generation != self.generation:
            raise Bad(
                f"somebody else changed the InferenceService during the rollout (generation {observed.generation}, "
                f"this run's is {self.generation}); `kubectl get --show-managed-fields` says who"
            )

    def _in_time(self, what: str) -> None:
        if self.clock() > self.deadline_s:
            raise TimedOut(f"out of time: {what}")

    def _patiently(self, call: Callable[[], T]) -> T:
        """Wait for an API server that is away: the traffic stays as it is meanwhile."""
        while True:
            try:
                return call()
            except Unreachable as error:
                self._in_time(str(error))
                self.say(f"  {error}")
                self.sleep(self.poll_s)
