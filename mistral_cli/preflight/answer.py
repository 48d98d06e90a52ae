"""What a question to the cluster, a registry or the hub came to: a value, nothing there, a refusal, or no answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Object = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Answer(Generic[T]):
    """With `unknown` and `refused` both empty, a `value` of None means that it does not exist."""

    value: T | None = None
    unknown: str = ""
    """Why there is no answer: the right that is missing, or the connection that failed."""
    refused: str = ""
    """The sentence of the webhook, quota or registry that refused."""


@dataclass(frozen=True)
class Seen:
    """Everything that was asked of the cluster, at one moment."""

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
    tried_service: Answer[Object] = Answer()
    """KServe's answer to the dry run: the object with its defaults."""
    tried_pod: Answer[Object] = Answer()
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


@dataclass(frozen=True)
class Manifest:
    """An image as its registry describes it."""

    digest: str
    platforms: frozenset[str]
    """Such as `linux/amd64`."""


@dataclass(frozen=True)
class Outside:
    """What was asked beyond the cluster, from the machine that runs the command."""

    image: Answer[Manifest] = Answer()
    repositories: Mapping[str, Answer[int]] = field(default_factory=dict)
    """The hub's HTTP status for each `hf://` address."""
    hosts: Mapping[str, Answer[str]] = field(default_factory=dict)
    """The address that a host name resolves to."""
