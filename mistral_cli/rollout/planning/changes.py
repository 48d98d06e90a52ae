"""The five changes that a rollout makes to an InferenceService, as data. Each becomes one merge patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mistral_cli.rollout.state import knative, standard
from mistral_cli.rollout.state.observed import STANDARD, Observed


@dataclass(frozen=True)
class Start:
    """A new image with its percentage, in one patch: an image alone would get all the traffic."""

    image: str
    share: int
    initial_scale: str | None = None
    """Knative: "0" makes a revision that is ready without a pod."""

    def __str__(self) -> str:
        scale = "" if self.initial_scale is None else f", initial-scale {self.initial_scale}"
        return f"image {self.image}, {self.share} % of the traffic{scale}"


@dataclass(frozen=True)
class Share:
    """The percentage of the newest version. Nothing restarts."""

    percent: int

    def __str__(self) -> str:
        return f"{self.percent} % of the traffic to the newest version"


@dataclass(frozen=True)
class Promote:
    """All traffic to the newest version."""

    percent: int | None
    """`canaryTrafficPercent` before the rollout: 100, or None for an absent field. Both mean all traffic."""

    def __str__(self) -> str:
        field = "no canaryTrafficPercent" if self.percent is None else f"canaryTrafficPercent {self.percent}"
        return f"all traffic to the newest version ({field})"


@dataclass(frozen=True)
class Revert:
    """The old image back."""

    image: str
    share: int | None
    """0 while the old revision still counts as rolled out, so that it has all the traffic at once."""
    initial_scale: str | None = None

    def __str__(self) -> str:
        share = "all" if self.share is None else f"{self.share} %"
        return f"image {self.image} back, {share} of the traffic to its new revision"


@dataclass(frozen=True)
class Replace:
    """Another image for the stable version of Standard mode, whose pods restart with it."""

    image: str

    def __str__(self) -> str:
        return f"image {self.image} for the stable version"


Change = Start | Share | Promote | Revert | Replace


def patch(change: Change, observed: Observed) -> dict[str, Any]:
    """Return the merge patch of a change for the service as it is now."""
    return (_standard if observed.mode == STANDARD else _knative)(change, observed)


def _knative(change: Change, observed: Observed) -> dict[str, Any]:
    match change:
        case Start(image, share, scale) | Revert(image, share, scale):
            return knative.image_patch(observed, image, share, scale)
        case Share(percent):
            return knative.share_patch(percent)
        case Promote(field):
            return knative.share_patch(field)
        case Replace(image):
            return knative.image_patch(observed, image, None, None)


def _standard(change: Change, observed: Observed) -> dict[str, Any]:
    match change:
        case Start(image, share, _):
            return standard.start_patch(observed, image, share)
        case Share(percent):
            return standard.share_patch(observed, percent)
        case Promote() | Revert():
            return standard.end_patch()
        case Replace(image):
            return standard.image_patch(observed, image)
