"""The state of the cluster at one moment. Data only: the functions that decide take it as an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from mistral_cli.objects import Object, dig

KNATIVE, STANDARD = "Knative", "Standard"
MODE_ANNOTATION = "serving.kserve.io/deploymentMode"
OLD_MODE_NAMES = {"Serverless": KNATIVE, "RawDeployment": STANDARD}


@dataclass(frozen=True)
class Observed:
    """The InferenceService and the objects behind it."""

    service: Object
    revisions: Sequence[Object] = ()
    """Knative mode: oldest first."""
    deployments: Sequence[Object] = ()
    """Standard mode."""
    route: Object | None = None
    """Standard mode with the Gateway API: the HTTPRoute."""
    pods: Sequence[Object] = ()
    events: Sequence[Object] = ()
    quotas: Sequence[Object] = ()
    nodes: Sequence[Object] | None = None
    """None: the caller may not list them."""
    node_pods: Sequence[Object] | None = None
    """Pods of every namespace, for what is free on the nodes; None: the caller may not list them."""
    log_tails: Mapping[str, str] = field(default_factory=dict)
    """Pod name to the last lines of the container that is at work."""
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def name(self) -> str:
        return str(self.service["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.service["metadata"]["namespace"])

    @property
    def generation(self) -> int:
        return int(self.service["metadata"].get("generation", 0))

    @property
    def mode(self) -> str:
        mode = str(dig(self.service, "metadata", "annotations", MODE_ANNOTATION) or "")
        return OLD_MODE_NAMES.get(mode, mode) or str(dig(self.service, "status", "deploymentMode") or KNATIVE)

    @property
    def predictor(self) -> Object:
        found: Object = dig(self.service, "spec", "predictor") or {}
        return found
