"""Finds other writers of the InferenceService that would undo a rollout."""

from __future__ import annotations

from dataclasses import dataclass

from mistral_cli.objects import Object, dig

MANAGER = "mistral-rollout"
"""This command's name in `metadata.managedFields`."""


@dataclass(frozen=True)
class Owner:
    """A tool that keeps the object equal to a repository or a release."""

    tool: str
    name: str
    self_heals: bool
    """It undoes other writers' changes by itself."""


def owner(service: Object) -> Owner | None:
    """Return the tool that owns the object; None for one applied by hand."""
    annotations = dig(service, "metadata", "annotations") or {}
    labels = dig(service, "metadata", "labels") or {}
    if tracking := annotations.get("argocd.argoproj.io/tracking-id"):
        return Owner("Argo CD", tracking.partition(":")[0], self_heals=True)
    for part in ("kustomize", "helm"):
        if name := labels.get(f"{part}.toolkit.fluxcd.io/name"):
            return Owner("Flux", name, self_heals=True)
    if release := annotations.get("meta.helm.sh/release-name"):
        return Owner("Helm", release, self_heals=False)
    return None


def refusal(service: Object) -> str | None:
    """Return why a rollout must not begin on this object."""
    found = owner(service)
    if found is None or not found.self_heals:
        return None
    return (
        f"{found.tool} ({found.name}) owns this InferenceService and would undo the rollout's patches. Make it ignore "
        f"spec.predictor.containers and spec.predictor.canaryTrafficPercent, then pass --shared-ownership."
    )


def advice(service: Object, image: str) -> str | None:
    """Return what to do after a promotion, so that the owner agrees with the cluster."""
    found = owner(service)
    if found is None:
        return None
    if found.tool == "Helm":
        return (
            f"Helm release {found.name} still has the old image in its values, and its next upgrade would bring it "
            f"back: helm upgrade {found.name} CHART -n {service['metadata']['namespace']} "
            f"--reset-then-reuse-values --set {_image_values(image)}"
        )
    return f"Put {image} into the repository that {found.tool} ({found.name}) reads."


def _image_values(image: str) -> str:
    """Return the chart's values for an image by digest or by tag; the release may have set the other one."""
    name, _, digest = image.partition("@")
    folder, slash, last = name.rpartition("/")
    repository, _, tag = last.partition(":")
    return f"image.repository={folder}{slash}{repository},image.tag={tag},image.digest={digest}"


def last_writer(service: Object) -> str | None:
    """Return who wrote the containers last, by `managedFields`; None where the API server does not say."""
    writers = [
        entry
        for entry in dig(service, "metadata", "managedFields") or ()
        if dig(entry, "fieldsV1", "f:spec", "f:predictor", "f:containers") is not None
    ]
    newest = max(writers, key=lambda entry: str(entry.get("time", "")), default=None)
    return str(newest["manager"]) if newest else None
