"""The conditions that a step waits for, each with a sentence. Never `Ready` and never `observedGeneration`.

An InferenceService stays Ready on its old revision while a new one starts, and its `observedGeneration` is the
Knative Service's, so neither says anything about a rollout.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import knative
from .observed import dig
from .status import Status


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
class Parked:
    """The newest version runs this image and is ready without a pod."""

    image: str

    def met(self, status: Status) -> bool:
        newest = status.candidate
        return newest is not None and NewestReady(self.image).met(status) and parked(newest.source)

    def __str__(self) -> str:
        return f"a revision with {self.image} is ready without a pod"

    def out_of_reach(self, status: Status) -> str | None:
        """Return why it cannot come: KServe drops the annotation where the cluster does not allow it."""
        newest = status.candidate
        if newest is None or newest.image != self.image or parked(newest.source):
            return None
        return (
            f"{newest.name} was made without {knative.INITIAL_SCALE}: set allow-zero-initial-scale to true in the "
            f"ConfigMap config-autoscaler of Knative"
        )


def parked(revision: object) -> bool:
    """Tell whether a Revision kept `initial-scale: "0"`, which KServe drops where the cluster does not allow it."""
    return dig(revision, "metadata", "annotations", knative.INITIAL_SCALE) == "0"


@dataclass(frozen=True)
class Split:
    """The newest version gets this share, and the stable one the rest."""

    percent: int
    stable: str

    def met(self, status: Status) -> bool:
        shares, candidate = status.versions.shares, status.candidate
        if candidate is None or not candidate.routed:
            return False  # ready, and the hosts still mean the old one
        wanted = {candidate.name: self.percent, self.stable: 100 - self.percent}
        return dict(shares) == {name: share for name, share in wanted.items() if share}

    def __str__(self) -> str:
        return f"the newest revision gets {self.percent} %, {self.stable} the rest"


@dataclass(frozen=True)
class OnlyImage:
    """Every request goes to versions of this image."""

    image: str

    def met(self, status: Status) -> bool:
        served = [status.versions.named(name) for name in status.versions.shares]
        return bool(served) and all(version is not None and version.image == self.image for version in served)

    def __str__(self) -> str:
        return f"all requests go to {self.image}"


@dataclass(frozen=True)
class Alone:
    """Nothing but this image exists any longer, and it has every request."""

    image: str

    def met(self, status: Status) -> bool:
        return OnlyImage(self.image).met(status) and all(each.image == self.image for each in status.versions.all)

    def __str__(self) -> str:
        return f"only {self.image} is left"


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
class Awake:
    """The newest version has a pod that answers."""

    def met(self, status: Status) -> bool:
        newest = status.candidate or status.stable
        return newest is not None and newest.name in status.awake

    def __str__(self) -> str:
        return "the newest revision has a pod that answers"


Goal = NewestReady | NewestExists | Parked | Split | OnlyImage | Alone | RolledOut | Awake
