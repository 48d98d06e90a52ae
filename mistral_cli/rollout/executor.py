"""Executes the steps of a plan in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Protocol, TypeVar

from mistral_cli.cluster import INFERENCE_SERVICE, REVISION, Conflict, Forbidden, Kind, Rejected, Unreachable
from mistral_cli.exit_codes import Failure
from mistral_cli.objects import Object
from mistral_cli.rollout.gates.rules import GateResult, format_result
from mistral_cli.rollout.lock import Lock, LockLost
from mistral_cli.rollout.planning import abort, changes, drift, plan
from mistral_cli.rollout.planning.abort import RolloutFailed, TimedOut
from mistral_cli.rollout.planning.goals import Goal, ReadyWithoutPod
from mistral_cli.rollout.reader import Reader
from mistral_cli.rollout.record import Progress, Record
from mistral_cli.rollout.state import knative
from mistral_cli.rollout.state.observed import Observed
from mistral_cli.rollout.state.status import Status, compute

T = TypeVar("T")

PAUSE_S = 45.0
"""The seconds that a swap takes in addition to loading the model."""


class Patcher(Protocol):
    """The operations of a cluster that the actions need."""

    def merge(
        self, kind: Kind, namespace: str, name: str, patch: Object, *, manager: str, dry_run: bool = False
    ) -> Object: ...
    def delete(self, kind: Kind, namespace: str, name: str) -> None: ...


class Evaluator(Protocol):
    """Measures the versions of a status and compares them by the gates."""

    def baseline(self, status: Status) -> dict[str, Any]: ...
    def evaluate(self, status: Status, share: int, baseline: dict[str, Any] | None) -> list[GateResult]: ...
    def wake(self, status: Status) -> None: ...


@dataclass
class Executor:
    """Runs one command on one InferenceService, under its lock."""

    cluster: Patcher
    reader: Reader
    lock: Lock
    evaluator: Evaluator
    log: Callable[[str], None]
    now: Callable[[], datetime]
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    deadline_s: float
    """The time on `clock` at which the command must have ended."""
    gpu_wait_s: float = 600.0
    poll_s: float = 2.0
    record: Record | None = None
    generation: int | None = None
    """The generation of the spec that this run read or wrote; another one means another writer. None: not checked."""
    results: list[GateResult] = field(default_factory=list)
    lost: threading.Event = field(default_factory=threading.Event)
    reverting: bool = False
    _shown: str = ""

    def execute(self, steps: Iterable[plan.Step]) -> None:
        """Execute the steps in order.

        Raises:
            RolloutFailed: the new version must be reverted, or a step took too long.
            ClusterError: the API server refused.
            LockLost: another runner has the lock.
        """
        for step in steps:
            self._check_lock()
            self.log(plan.describe(step))
            match step:
                case plan.Patch(change, _):
                    self.patch(change)
                case plan.WaitFor(goal, _, settle_s, optional):
                    if not self._wait_for(goal, settle_s, optional):
                        return
                case plan.Measure(share, _):
                    self._measure(share)
                case plan.MeasureStable(_):
                    self._measure_stable()
                case plan.ShortenWindow(version, _):
                    self._shorten_window(version)
                case plan.Wake(_):
                    self._wake()
                case plan.DeleteFailed():
                    self._delete_failed(step)
                case plan.Finish(progress, _):
                    self.save_record(progress=progress)

    def refresh(self, *, capacity: bool = False) -> tuple[Observed, Status]:
        """Read the cluster, compute the status, and show it when it changed."""
        observed = self._retry_while_unreachable(lambda: self.reader.read(capacity=capacity))
        status = compute(observed, self.record.changed_at if self.record else None)
        if status.describe() != self._shown:
            self._shown = status.describe()
            self.log(f"  {self._shown}")
        return observed, status

    def save_record(self, **fields: Any) -> None:
        """Save the record with these fields changed."""
        assert self.record is not None
        self.record = self.record.at(self.now(), **fields)
        self._retry_while_unreachable(lambda: self.lock.write(self.record))  # type: ignore[arg-type]

    def patch(self, change: changes.Change) -> None:
        """Send one merge patch for the object as it was read; after a conflict, read it again."""
        if self.record is not None:
            self.save_record()
        while True:
            observed = self._retry_while_unreachable(self.reader.read)
            self._check_generation(observed)
            body = changes.patch(change, observed)
            body["metadata"] = {"resourceVersion": observed.service["metadata"]["resourceVersion"]}
            try:
                answer = self.cluster.merge(
                    INFERENCE_SERVICE, observed.namespace, observed.name, body, manager=drift.MANAGER
                )
                self.generation = answer["metadata"].get("generation")
                return
            except Conflict as error:
                self._check_deadline(str(error))
            except Unreachable as error:
                self._check_deadline(str(error))
                self.generation = None  # the patch may have arrived; then sending it again changes nothing
            self.sleep(self.poll_s / 4)

    def try_patch(self, change: changes.Change) -> None:
        """Send a patch as a server-side dry run, which checks rights, schema and webhooks.

        Raises:
            ClusterError: the API server refused it.
        """
        observed = self._retry_while_unreachable(self.reader.read)
        body = changes.patch(change, observed)
        name, namespace = observed.name, observed.namespace
        self.cluster.merge(INFERENCE_SERVICE, namespace, name, body, manager=drift.MANAGER, dry_run=True)

    def _wait_for(self, goal: Goal, settle_s: float, optional: bool) -> bool:
        """Poll until the goal has held for `settle_s`. Return False when an optional goal cannot be reached."""
        begun_s, met_s = self.clock(), None
        while True:
            self._check_lock()
            observed, status = self.refresh()
            met_s = (met_s if met_s is not None else self.clock()) if goal.met(status) else None
            if met_s is not None and self.clock() - met_s >= settle_s:
                return True
            if met_s is None:
                try:
                    self._check_progress(observed, status, self.clock() - begun_s)
                    if isinstance(goal, ReadyWithoutPod) and (reason := goal.why_unreachable(status)):
                        raise RolloutFailed(reason)
                    self._check_deadline(f"still waiting until {goal}: {status.message}")
                except RolloutFailed as failure:
                    if not optional:
                        raise
                    serving = " and ".join(status.versions.shares)
                    self.log(f"Stopped here: {serving} serves all users, but this was not reached: {goal} ({failure}).")
                    self.log(
                        f"The spec keeps 0 percent for new revisions until `mistral rollout promote {observed.name}`."
                    )
                    self.save_record(progress=Progress.REVERTED)
                    return False
            self.sleep(self.poll_s)

    def _measure(self, share: int) -> None:
        """Measure until every gate has data.

        Raises:
            RolloutFailed: a gate failed.
        """
        while True:
            self._check_lock()
            observed, status = self.refresh()
            self._check_progress(observed, status, 0)
            try:
                found = self.evaluator.evaluate(status, share, self.record.baseline if self.record else None)
            except Failure as failure:
                raise RolloutFailed(f"the gates cannot be measured: {failure}") from failure
            self.results = found
            for result in found:
                self.log(f"  {format_result(result)}")
            if failed := [result for result in found if result.passed is False]:
                raise RolloutFailed("; ".join(format_result(result) for result in failed))
            if all(result.passed for result in found):
                return
            self._check_deadline("gates without data: " + ", ".join(j.name for j in found if j.passed is None))
            self.sleep(2 * self.poll_s)

    def _measure_stable(self) -> None:
        try:
            self.save_record(baseline=self.evaluator.baseline(self.refresh()[1]))
        except Failure as failure:
            raise RolloutFailed(f"the gates cannot be measured: {failure}") from failure

    def _wake(self) -> None:
        """Send the request in a thread, so that polling reports why the pod does not start."""
        status = self.refresh()[1]
        threading.Thread(target=self.evaluator.wake, args=(status,), name="wake", daemon=True).start()

    def _shorten_window(self, version: str) -> None:
        observed, _ = self.refresh()
        self.log(f"  Requests will wait for the model's load time plus about {PAUSE_S:.0f} s. None is refused.")
        try:
            self.cluster.merge(REVISION, observed.namespace, version, knative.window_patch(), manager=drift.MANAGER)
        except Rejected as error:
            self.log(f"  The pause will be longer by the scale-down window: {error}")

    def _delete_failed(self, step: plan.DeleteFailed) -> None:
        observed, status = self.refresh()
        for name in plan.failed_revisions(status, step):
            self.log(f"  deleting {name}")
            try:
                self._retry_while_unreachable(partial(self.cluster.delete, REVISION, observed.namespace, name))
            except (Forbidden, Rejected) as error:
                self.log(f"  {name} keeps its pod and its GPU until the progress deadline: {error}")

    def _check_progress(self, observed: Observed, status: Status, waited_s: float) -> None:
        self._check_generation(observed)
        if self.reverting:
            abort.check_revert(status, waited_s, self.record.image if self.record else None)
        else:
            abort.check_rollout(observed, status, waited_s, self.gpu_wait_s)

    def _check_lock(self) -> None:
        if self.lost.is_set():
            raise LockLost("Another runner has taken the lock. This run stopped and changed nothing more.")

    def _check_generation(self, observed: Observed) -> None:
        if self.generation is not None and observed.generation != self.generation:
            raise RolloutFailed(
                f"another writer changed the InferenceService during the rollout (generation {observed.generation}, "
                f"this run wrote {self.generation}); `kubectl get --show-managed-fields` names the writer"
            )

    def _check_deadline(self, what: str) -> None:
        if self.clock() > self.deadline_s:
            raise TimedOut(f"out of time: {what}")

    def _retry_while_unreachable(self, call: Callable[[], T]) -> T:
        """Repeat a call while the API server is unreachable. The traffic does not change meanwhile."""
        while True:
            try:
                return call()
            except Unreachable as error:
                self._check_deadline(str(error))
                self.log(f"  {error}")
                self.sleep(self.poll_s)
