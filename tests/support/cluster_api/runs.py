"""Runs rollouts on the cluster double in simulated time: a pause of the runner advances the cluster by some ticks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mistral_cli.cluster import Cluster
from mistral_cli.rollout import verbs
from mistral_cli.rollout.executor import Executor
from mistral_cli.rollout.gates.rules import GateResult
from mistral_cli.rollout.lock import Lock
from mistral_cli.rollout.planning.preconditions import Options
from mistral_cli.rollout.reader import Reader
from mistral_cli.rollout.state.status import Status

from .api import CONTEXT, Store, serve
from .knative import TICK_S, Image, World
from .kserve import NAME, NAMESPACE, SERVICE

OLD, NEW = "dev.local/mistral:old", "dev.local/mistral:new"
BROKEN = {
    "crashes": Image(crashes=True),
    "cannot be pulled": Image(pull_error='failed to pull image "x": manifest unknown'),
    "never gets ready": Image(hangs=True),
}
"""Images that do not start."""


@dataclass
class Verdicts:
    """Gates with given results: an image fails from a given percentage on. `test_gates` tests real gates."""

    fails_from: dict[str, int] = field(default_factory=dict)
    measured: list[int] = field(default_factory=list)
    on_measure: Callable[[int], object] = lambda share: None
    """Called while a step is measured."""

    def baseline(self, status: Status) -> dict[str, Any]:
        return {"texts": {}, "ttft_s": [], "tokens_per_second": []}

    def evaluate(self, status: Status, share: int, baseline: dict[str, Any] | None) -> list[GateResult]:
        newest = status.candidate or status.stable
        assert newest is not None
        self.measured.append(share)
        self.on_measure(share)
        passed = share < self.fails_from.get(newest.image, 101)
        return [GateResult("error_rate", 0.0 if passed else 0.5, 0.0, passed)]

    def wake(self, status: Status) -> None:
        pass


class Killed(BaseException):
    """The runner is killed, as by kill -9: it sends nothing more to the cluster."""


class MortalCluster(Cluster):
    """The client of a runner that is killed at its n-th request, before the request or the answer arrives."""

    def __init__(self, kubeconfig: Path, dies_at: int | None) -> None:
        super().__init__(CONTEXT, config_file=str(kubeconfig), retries=2)
        self._left = dies_at

    def _send(self, *args: Any, **more: Any) -> bytes:
        self._live()
        answer = super()._send(*args, **more)
        self._live()
        return answer

    def _live(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                raise Killed


@dataclass
class Bench:
    """A cluster, its kubeconfig, and functions that start runners."""

    world: Any
    kubeconfig: Path
    verdicts: Verdicts = field(default_factory=Verdicts)
    logged: list[str] = field(default_factory=list)
    elapsed_s: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.elapsed_s += seconds
        for _ in range(max(1, round(seconds / TICK_S))):
            self.world.tick()

    def now(self) -> datetime:
        return self.world.now

    def executor(self, owner: str = "runner-1", timeout_s: float = 2700, dies_at: int | None = None) -> Executor:
        cluster = MortalCluster(self.kubeconfig, dies_at)
        return Executor(
            cluster=cluster,
            reader=Reader(cluster, NAMESPACE, NAME, self.now),
            lock=Lock(cluster, NAMESPACE, NAME, owner, self.now),
            evaluator=self.verdicts,
            log=self.logged.append,
            now=self.now,
            clock=lambda: self.elapsed_s,
            sleep=self.sleep,
            deadline_s=self.elapsed_s + timeout_s,
            gpu_wait_s=60,
        )

    def deploy(
        self, image: str = NEW, owner: str = "runner-1", timeout_s: float = 2700, dies_at: int | None = None,
        **options: Any,
    ) -> str | None:  # fmt: skip
        """Run `deploy` as one runner would, lock included; return None if the runner was killed."""
        executor = self.executor(owner, timeout_s, dies_at)
        try:
            executor.lock.acquire()
            outcome = verbs.deploy(executor, Options(image, **options))
            executor.lock.release()
            return outcome
        except Killed:
            return None

    def users(self) -> dict[str, int]:
        """Return the current percentage of user traffic, by image."""
        return {image: share for image, share in self.world.shares[-1].items() if share}

    def highest_share(self, image: str) -> int:
        return max(shares.get(image, 0) for shares in self.world.shares)

    def patches(self) -> list[dict[str, Any]]:
        """Return the predictors of all patches to the service."""
        return [
            body["spec"]["predictor"]
            for method, path, body in self.world.store.asked
            if (method, path) == ("PATCH", SERVICE)
        ]

    def change_service(self, image: str, percent: int | None) -> None:
        """Change the service as kubectl would, and run the cluster's controllers."""
        service = self.world.store.objects[SERVICE]
        changed = {**service["spec"]["predictor"], "containers": [{"name": "kserve-container", "image": image}]}
        changed.pop("canaryTrafficPercent", None)
        if percent is not None:
            changed["canaryTrafficPercent"] = percent
        self.world.store.put(SERVICE, {**service, "spec": {"predictor": changed}})
        for _ in range(10):
            self.world.tick()


@contextmanager
def bench(folder: Path, image: str = OLD, **world: Any) -> Iterator[Bench]:
    """Serve a cluster on which `image` has all traffic."""
    store = Store()
    predictor = world.pop("predictor", {})
    made = world.pop("kind", World)(store, **world).install(image, **predictor)
    with serve(store, folder) as kubeconfig:
        yield Bench(made, kubeconfig)


@contextmanager
def ticking(world: World, period_s: float = 0.02) -> Iterator[None]:
    """Tick the cluster in a thread, for runners in other processes."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(period_s):
            world.tick()

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
