"""The goals that a step waits for, each with a sentence. `Ready` and `observedGeneration` are not among them.

An InferenceService stays Ready on its old revision while a new one starts, and its `observedGeneration` is the
Knative Service's, so neither shows the progress of a rollout.
"""

from __future__ import annotations

from dataclasses import dataclass

from mistral_cli.objects import dig
from mistral_cli.rollout.state import knative
from mistral_cli.rollout.state.status import Status


@dataclass(frozen=True)
class NewestReady:
    """The newest version runs this image and is ready."""

    image: str
    known: frozenset[str] = frozenset()
    """Versions that existed before; a revision of the same image among them is not the new one."""

    def met(self, status: Status) -> bool:
        newest = status.candidate or status.stable
        return (
            status.versions.created
            and newest is not None
            and newest.ready
            and newest.image == self.image
            and newest.name not in self.known
        )

    def __str__(self) -> str:
        return f"a {'new ' if self.known else ''}revision with {self.image} is ready"


@dataclass(frozen=True)
class NewestExists:
    """The newest version runs this image, ready or not."""

    image: str

    def met(self, status: Status) -> bool:
        newest = status.candidate or status.stable
        return status.versions.created and newest is not None and newest.image == self.image

    def __str__(self) -> str:
        return f"the newest revision is one with {self.image}"


@dataclass(frozen=True)
class ReadyWithoutPod:
    """The newest version runs this image and is ready without a pod."""

    image: str

    def met(self, status: Status) -> bool:
        newest = status.candidate
        return newest is not None and NewestReady(self.image).met(status) and keeps_zero_initial_scale(newest.source)

    def __str__(self) -> str:
        return f"a revision with {self.image} is ready without a pod"

    def why_unreachable(self, status: Status) -> str | None:
        """Return why the goal cannot be reached: KServe drops the annotation where the cluster does not allow it."""
        newest = status.candidate
        if newest is None or newest.image != self.image or keeps_zero_initial_scale(newest.source):
            return None
        return (
            f"{newest.name} was made without {knative.INITIAL_SCALE}: set allow-zero-initial-scale to true in the "
            f"ConfigMap config-autoscaler of Knative"
        )


def keeps_zero_initial_scale(revision: object) -> bool:
    """Return whether a Revision kept `initial-scale: "0"`, which KServe drops where the cluster does not allow it."""
    return dig(revision, "metadata", "annotations", knative.INITIAL_SCALE) == "0"


@dataclass(frozen=True)
class TrafficSplit:
    """The newest version gets this percentage, and the stable one the rest."""

    percent: int
    stable: str

    def met(self, status: Status) -> bool:
        shares, candidate = status.versions.shares, status.candidate
        if candidate is None or not candidate.routed:
            return False  # it is ready, but the hosts still route to the old one
        wanted = {candidate.name: self.percent, self.stable: 100 - self.percent}
        return dict(shares) == {name: share for name, share in wanted.items() if share}

    def __str__(self) -> str:
        return f"the newest revision gets {self.percent} %, {self.stable} the rest"


@dataclass(frozen=True)
class AllTrafficTo:
    """Every request goes to versions of this image."""

    image: str

    def met(self, status: Status) -> bool:
        served = [status.versions.named(name) for name in status.versions.shares]
        return bool(served) and all(version is not None and version.image == self.image for version in served)

    def __str__(self) -> str:
        return f"all requests go to {self.image}"


@dataclass(frozen=True)
class OnlyImageExists:
    """Only versions of this image exist, and they get every request."""

    image: str

    def met(self, status: Status) -> bool:
        return AllTrafficTo(self.image).met(status) and all(each.image == self.image for each in status.versions.all)

    def __str__(self) -> str:
        return f"only versions of {self.image} exist"


@dataclass(frozen=True)
class RolledOut:
    """The newest version runs this image, is ready, and has all the traffic."""

    image: str

    def met(self, status: Status) -> bool:
        stable = status.stable
        return (
            status.candidate is None
            and stable is not None
            and NewestReady(self.image).met(status)
            and dict(status.versions.shares) == {stable.name: 100}
        )

    def __str__(self) -> str:
        return f"a revision with {self.image} has all the traffic"


@dataclass(frozen=True)
class StableReady:
    """The stable version runs this image and is ready."""

    image: str

    def met(self, status: Status) -> bool:
        return status.stable is not None and status.stable.ready and status.stable.image == self.image

    def __str__(self) -> str:
        return f"the stable version runs {self.image}"


@dataclass(frozen=True)
class HasReadyPod:
    """The newest version has a ready pod."""

    def met(self, status: Status) -> bool:
        newest = status.candidate or status.stable
        return newest is not None and newest.name in status.running

    def __str__(self) -> str:
        return "the newest revision has a ready pod"


Goal = (
    NewestReady
    | NewestExists
    | ReadyWithoutPod
    | TrafficSplit
    | AllTrafficTo
    | OnlyImageExists
    | RolledOut
    | StableReady
    | HasReadyPod
)
