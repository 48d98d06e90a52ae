"""The parts of a release: the stable version, the candidate, and their shares of the traffic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mistral_cli.objects import Object


@dataclass(frozen=True)
class Version:
    """One Knative revision, or one predictor of Standard mode."""

    name: str
    image: str
    ready: bool
    share: int = 0
    """Percent of the users' requests, from the status, not from the spec."""
    routed: bool = False
    """The traffic names it, if only with 0 percent."""
    url: str = ""
    """The URL of this version alone; empty when it has none."""
    source: Object = field(default_factory=dict, repr=False, compare=False)
    """The Revision or Deployment."""


@dataclass(frozen=True)
class Versions:
    """The state of a release, in one form for both modes."""

    stable: Version | None
    """The version that had all the traffic last; None before the first one is ready."""
    candidate: Version | None
    """The newest version, when it is not the stable one."""
    all: tuple[Version, ...]
    """Oldest first."""
    shares: Mapping[str, int]
    """Version to percent, every version that the traffic names."""
    desired_image: str
    """Image of the newest version that the spec asks for."""
    desired_share: int | None
    """Percent that the spec gives to the newest version; None: the field is absent, which means all."""
    created: bool
    """The newest version that exists is the one that the spec asks for."""
    url: str
    """The URL for users."""

    def named(self, name: str | None) -> Version | None:
        return next((version for version in self.all if version.name == name), None)
