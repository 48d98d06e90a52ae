"""The objects that would be installed, and what they need of a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mistral_cli.objects import Object, dig
from mistral_cli.preflight.release.artifacts import HUB, HUB_TOKEN
from mistral_cli.rollout.planning.capacity import GPU_PREFIXES
from mistral_cli.rollout.state.observed import KNATIVE, MODE_ANNOTATION, OLD_MODE_NAMES


@dataclass(frozen=True)
class SecretUse:
    """A Secret that the pods need."""

    name: str
    keys: frozenset[str] = frozenset()
    pulls_images: bool = False


@dataclass(frozen=True)
class Release:
    """One InferenceService and the objects beside it."""

    objects: Sequence[Object]
    service: Object

    @property
    def name(self) -> str:
        return str(self.service["metadata"]["name"])

    @property
    def mode(self) -> str:
        message = str(dig(self.service, "metadata", "annotations", MODE_ANNOTATION) or "")
        return OLD_MODE_NAMES.get(message, message)

    @property
    def knative(self) -> bool:
        return self.mode == KNATIVE

    @property
    def predictor(self) -> Object:
        return dict(self.service["spec"]["predictor"])

    @property
    def container(self) -> Object:
        """KServe runs the first container."""
        return dict(self.predictor["containers"][0])

    @property
    def image(self) -> str:
        return str(self.container.get("image", ""))

    @property
    def requests(self) -> Mapping[str, str]:
        """The resources that the container asks for; Kubernetes copies a limit into a missing request."""
        resources = self.container.get("resources") or {}
        return {**(resources.get("limits") or {}), **(resources.get("requests") or {})}

    @property
    def gpu_resource(self) -> str:
        """The name of the GPU's resource; empty for a release without one."""
        limits = dig(self.container, "resources", "limits") or {}
        return next((key for key in limits if key.startswith(GPU_PREFIXES)), "")

    @property
    def annotations(self) -> Mapping[str, str]:
        """The annotations of the revision template: KServe copies those of the InferenceService into it."""
        own = dig(self.service, "metadata", "annotations") or {}
        return {**own, **(self.predictor.get("annotations") or {})}

    @property
    def storage_uri(self) -> str:
        return _variable(self.container, "STORAGE_URI")

    @property
    def storage_container(self) -> str:
        return str(self.predictor.get("storageContainerName") or "")

    @property
    def account(self) -> str:
        return str(self.predictor.get("serviceAccountName") or "default")

    @property
    def hub_addresses(self) -> list[str]:
        """The `hf://` addresses that are downloaded, by the pods or by the Job that fills a cache."""
        uris = {self.storage_uri}
        for spec in self._job_pods():
            uris |= {str(arg) for container in spec["containers"] for arg in container.get("args") or ()}
        return sorted(uri for uri in uris if uri.startswith(HUB) and "\n" not in uri)

    @property
    def hub_endpoint(self) -> str:
        """The mirror of the hub that the download is told to use; empty: the hub itself."""
        containers = [dig(o, "spec", "container") or {} for o in self.of_kind("ClusterStorageContainer")]
        containers += [container for spec in self._job_pods() for container in spec["containers"]]
        return next((found for each in containers if (found := _variable(each, "HF_ENDPOINT"))), "")

    def owns(self, pod: Object, namespace: str) -> bool:
        """Return whether a pod of the cluster runs this release already."""
        metadata = pod["metadata"]
        label = (metadata.get("labels") or {}).get("serving.kserve.io/inferenceservice")
        return bool(metadata.get("namespace") == namespace and label == self.name)

    def of_kind(self, kind: str) -> list[Object]:
        return [o for o in self.objects if o["kind"] == kind]

    def created(self, kind: str, name: str) -> Object | None:
        """Return the object where the release itself creates it."""
        return next((o for o in self.of_kind(kind) if o["metadata"]["name"] == name), None)

    def claims(self) -> list[str]:
        """Return the names of the PersistentVolumeClaims that the pods mount."""
        names = {self.storage_uri.removeprefix("pvc://").partition("/")[0]} if self._is_volume() else set()
        for spec in (self.predictor, *self._job_pods()):
            for volume in spec.get("volumes") or ():
                names.add(str(dig(volume, "persistentVolumeClaim", "claimName") or ""))
        return sorted(names - {""})

    def secrets(self, account: Object | None) -> list[SecretUse]:
        """Return the Secrets that must be there before the install; those that the release creates are left out.

        `account` is the pods' ServiceAccount in the cluster, where the release does not create it.
        """
        uses: dict[str, SecretUse] = {}
        for use in self._uses(self.created("ServiceAccount", self.account) or account or {}):
            old = uses.get(use.name, use)
            uses[use.name] = SecretUse(use.name, old.keys | use.keys, old.pulls_images or use.pulls_images)
        return [use for name, use in sorted(uses.items()) if self.created("Secret", name) is None]

    def _uses(self, account: Object) -> Iterator[SecretUse]:
        listed = [str(each["name"]) for each in account.get("secrets") or () if each.get("name")]
        token = frozenset({HUB_TOKEN}) if self.storage_uri.startswith(HUB) else frozenset[str]()
        for position, name in enumerate(listed):
            yield SecretUse(name, token if position == 0 else frozenset())
        for holder in (account, self.predictor, *self._job_pods()):
            for each in holder.get("imagePullSecrets") or ():
                yield SecretUse(str(each["name"]), pulls_images=True)
        for spec in (self.predictor, *self._job_pods()):
            yield from _pod_secrets(spec)

    def _is_volume(self) -> bool:
        return self.storage_uri.startswith("pvc://")

    def _job_pods(self) -> list[Object]:
        return [job["spec"]["template"]["spec"] for job in self.of_kind("Job")]


def parse(rendered: str) -> Release:
    """Read rendered manifests; hooks, such as the pod of `helm test`, are left out.

    Raises:
        ValueError: it is no YAML, or it does not hold exactly one InferenceService with a container.
    """
    try:
        documents = [document for document in yaml.safe_load_all(rendered) if document]
    except yaml.YAMLError as error:
        raise ValueError(f"The manifests are not YAML: {error}") from error
    if any(not (isinstance(each, dict) and each.get("kind") and dig(each, "metadata", "name")) for each in documents):
        raise ValueError("The manifests hold something that is no Kubernetes object.")
    objects = [each for each in documents if "helm.sh/hook" not in (dig(each, "metadata", "annotations") or {})]
    services = [each for each in objects if each["kind"] == "InferenceService"]
    if len(services) != 1:
        raise ValueError(f"The manifests hold {len(services)} InferenceServices; preflight needs exactly one.")
    if not dig(services[0], "spec", "predictor", "containers"):
        raise ValueError("The InferenceService has no spec.predictor.containers: it is no custom predictor.")
    return Release(objects, services[0])


def _variable(container: Object, name: str) -> str:
    return next((str(each.get("value", "")) for each in container.get("env") or () if each.get("name") == name), "")


def _pod_secrets(spec: Object) -> Iterable[SecretUse]:
    for container in (*(spec.get("initContainers") or ()), *spec["containers"]):
        for variable in container.get("env") or ():
            if (reference := dig(variable, "valueFrom", "secretKeyRef")) and not reference.get("optional"):
                yield SecretUse(str(reference["name"]), frozenset({str(reference["key"])}))
        for source in container.get("envFrom") or ():
            if (reference := source.get("secretRef")) and not reference.get("optional"):
                yield SecretUse(str(reference["name"]))
    for volume in spec.get("volumes") or ():
        yield from _volume_secrets(volume)


def _volume_secrets(volume: Mapping[str, Any]) -> Iterable[SecretUse]:
    if (secret := volume.get("secret")) and not secret.get("optional"):
        yield SecretUse(str(secret["secretName"]), frozenset(str(item["key"]) for item in secret.get("items") or ()))
    for source in dig(volume, "projected", "sources") or ():
        if (secret := source.get("secret")) and not secret.get("optional"):
            keys = frozenset(str(item["key"]) for item in secret.get("items") or ())
            yield SecretUse(str(secret["name"]), keys)
