"""The answers of the cluster, the registry and the model hub. Data only: the checks take it as an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from mistral_cli.objects import Object, dig

T = TypeVar("T")

IN_CLUSTER_DOMAIN = "svc.cluster.local"


@dataclass(frozen=True)
class Answer(Generic[T]):
    """The answer to one question: a value, a refusal, or the reason why it is unknown.

    With `unknown` and `refused` both empty, a `value` of None means that it does not exist.
    """

    value: T | None = None
    unknown: str = ""
    """Why there is no answer: the right that is missing, or the connection that failed."""
    refused: str = ""
    """The sentence of the webhook, quota or registry that refused."""


@dataclass(frozen=True)
class Observed:
    """The answers of the cluster at one moment."""

    version: Answer[str] = Answer("")
    namespace: Answer[Object] = Answer()
    kinds: Mapping[str, Answer[frozenset[str]]] = field(default_factory=dict)
    """The kinds of each API version that the release uses."""
    predictor_fields: Answer[frozenset[str]] = Answer()
    """The fields that the InferenceService's schema has under `spec.predictor`."""
    configs: Mapping[str, Answer[Object]] = field(default_factory=dict)
    """Knative's ConfigMaps by name."""
    service: Answer[Object] = Answer()
    """The InferenceService, where it is installed already."""
    service_dry_run: Answer[Object] = Answer()
    """KServe's answer to the dry run: the object with its defaults."""
    pod_dry_run: Answer[Object] = Answer()
    """The answer to the dry run of the Knative Service, or of the pod in Standard mode."""
    account: Answer[Object] = Answer()
    """The ServiceAccount of the pods, where the release does not create it."""
    secrets: Mapping[str, Answer[Object]] = field(default_factory=dict)
    storage_container: Answer[Object] = Answer()
    claims: Mapping[str, Answer[Object]] = field(default_factory=dict)
    storage_classes: Answer[Sequence[Object]] = Answer(())
    nodes: Answer[Sequence[Object]] = Answer(())
    pods: Answer[Sequence[Object]] = Answer(())
    """The pods of every namespace."""
    quotas: Answer[Sequence[Object]] = Answer(())
    prometheuses: Answer[Sequence[Object]] = Answer(())

    def host(self, namespace: str) -> str:
        """Return the host of the service; empty where the cluster names none.

        Before the install it is a host below Knative's domain. The domain's DNS record is a wildcard, so one host
        stands for all.
        """
        installed = urlsplit(str(dig(self.service.value, "status", "url") or "")).hostname
        if installed:
            return installed
        domain = self._knative_domain()
        return f"preflight.{namespace}.{domain}" if domain and domain != IN_CLUSTER_DOMAIN else ""

    def _knative_domain(self) -> str:
        """Return Knative's domain for services that no selector gives another one."""
        config = dig(self.configs.get("config-domain", Answer()).value, "data") or {}
        return next((str(key) for key, value in config.items() if not key.startswith("_") and not value), "")


@dataclass(frozen=True)
class Manifest:
    """An image as its registry describes it."""

    digest: str
    platforms: frozenset[str]
    """Such as `linux/amd64`."""


@dataclass(frozen=True)
class External:
    """The answers from beyond the cluster, to the machine that runs the command."""

    image: Answer[Manifest] = Answer()
    repositories: Mapping[str, Answer[int]] = field(default_factory=dict)
    """The hub's HTTP status for each `hf://` address."""
    hosts: Mapping[str, Answer[str]] = field(default_factory=dict)
    """The address that a host name resolves to."""
