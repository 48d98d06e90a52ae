"""The preconditions of a rollout: what would fail or do harm later is refused before the first patch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mistral_cli.objects import dig
from mistral_cli.rollout.planning import capacity, drift
from mistral_cli.rollout.state import knative
from mistral_cli.rollout.state.observed import KNATIVE, STANDARD, Observed
from mistral_cli.rollout.state.status import Phase, Status

CANARY, SWAP = "canary", "swap"
RESOLVED_BY_NAME = ("dev.local/", "ko.local/", "kind.local/")
"""Registries whose tags Knative does not resolve: images that were loaded into the nodes."""


class Refused(Exception):
    """The rollout was refused and nothing changed; `str(error)` has the reasons."""


@dataclass(frozen=True)
class Options:
    """The options of the command."""

    image: str
    strategy: str = CANARY
    steps: tuple[int, ...] = (10, 50)
    shared_ownership: bool = False


def check(observed: Observed, status: Status, options: Options) -> None:
    """Check every precondition.

    Raises:
        Refused: with all reasons.
    """
    reasons = [*_image(options), *_state(observed, status, options)]
    if not options.shared_ownership and (reason := drift.refusal(observed.service)):
        reasons.append(reason)
    reasons += capacity.refusals(observed, options.strategy == SWAP)
    if reasons:
        raise Refused(" ".join(reasons))


def _image(options: Options) -> list[str]:
    if "@sha256:" in options.image or options.image.startswith(RESOLVED_BY_NAME):
        return []
    return [f"--image {options.image} is not a digest. A tag can move, so a revert could bring another image."]


def _state(observed: Observed, status: Status, options: Options) -> list[str]:
    reasons = []
    if not settled(status):
        remedy = "repair it first" if status.candidate is None else "promote or revert it first"
        reasons.append(f"{observed.name} is not stable ({status.describe()}): {remedy}.")
    if observed.mode not in (KNATIVE, STANDARD):
        reasons.append(f"Deployment mode {observed.mode} is not supported.")
    if observed.mode == STANDARD:
        if options.strategy == SWAP:
            reasons.append("--strategy swap needs Knative mode: only Knative's activator holds requests.")
        if observed.route is None:
            reasons.append(
                "The service has no HTTPRoute: in Standard mode KServe splits traffic only with the Gateway API."
            )
        if not _names_its_model(observed.predictor):
            reasons.append("The container has no STORAGE_URI: KServe takes a canary only beside a model that it knows.")
    elif dig(observed.service, "metadata", "annotations", knative.TAG_ROUTING) != "true" and options.strategy == CANARY:
        reasons.append(f"The annotation {knative.TAG_ROUTING} is not true: revisions have no addresses.")
    return reasons


def _names_its_model(predictor: Mapping[str, Any]) -> bool:
    variables = [variable for container in predictor.get("containers", ()) for variable in container.get("env", ())]
    return "model" in predictor or any(variable["name"] == "STORAGE_URI" for variable in variables)


def settled(status: Status) -> bool:
    """Return whether one image has all the traffic and no rollout is in progress.

    A revert may leave the old revision in service beside a newer one of the same image that waits for a GPU.
    """
    stable, candidate = status.stable, status.candidate
    if stable is None or status.versions.desired_image != stable.image:
        return False
    if candidate is None:
        return status.phase == Phase.STABLE
    return candidate.image == stable.image and set(status.versions.shares) <= {stable.name, candidate.name}
