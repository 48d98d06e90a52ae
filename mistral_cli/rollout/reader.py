"""Reads everything that a status is computed from, in a handful of requests."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from mistral_cli.cluster import (
    DEPLOYMENT,
    EVENT,
    HTTP_ROUTE,
    INFERENCE_SERVICE,
    NODE,
    POD,
    QUOTA,
    REVISION,
    ClusterError,
    Forbidden,
    Kind,
    NotFound,
    Object,
)  # fmt: skip
from mistral_cli.objects import condition, dig
from mistral_cli.rollout.state.observed import STANDARD, Observed

LABEL = "serving.kserve.io/inferenceservice"
KNATIVE_SERVICE_LABEL = "serving.knative.dev/service"


class Source(Protocol):
    """The operations of a cluster that the reader needs."""

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object: ...
    def list(self, kind: Kind, namespace: str | None = None, **query: str) -> list[Object]: ...
    def log_tail(self, namespace: str, pod: str, container: str, lines: int = 5) -> str: ...


class Reader:
    """One InferenceService and what belongs to it."""

    def __init__(
        self, cluster: Source, namespace: str, name: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._cluster, self._namespace, self._name, self._now = cluster, namespace, name, now

    def read(self, *, capacity: bool = False) -> Observed:
        """Read the objects; `capacity` adds quotas and nodes, which only the check before a rollout needs."""
        cluster, namespace = self._cluster, self._namespace
        service = cluster.get(INFERENCE_SERVICE, namespace, self._name)
        mine = {"labelSelector": f"{LABEL}={self._name}"}
        pods = cluster.list(POD, namespace, **mine)
        observed = Observed(service)
        standard = observed.mode == STANDARD
        return Observed(
            service=service,
            revisions=[] if standard else cluster.list(REVISION, namespace, **mine),
            deployments=cluster.list(DEPLOYMENT, namespace, **mine) if standard else [],
            route=self._route() if standard else None,
            pods=pods,
            events=self._allowed(EVENT, namespace) or [],
            quotas=(self._allowed(QUOTA, namespace) or []) if capacity else [],
            nodes=self._allowed(NODE, None) if capacity else None,
            node_pods=self._allowed(POD, None) if capacity else None,
            log_tails={pod["metadata"]["name"]: self._tail(pod) for pod in pods if _is_starting(pod)},
            now=self._now(),
        )

    def _route(self) -> Object | None:
        try:
            return self._cluster.get(HTTP_ROUTE, self._namespace, self._name)
        except (NotFound, Forbidden):
            return None

    def _allowed(self, kind: Kind, namespace: str | None) -> list[Object] | None:
        """List what the caller may see; a right that is missing makes the check blind, not wrong."""
        try:
            return self._cluster.list(kind, namespace)
        except Forbidden:
            return None

    def _tail(self, pod: Object) -> str:
        """Return the last log lines of the container that is at work; an answer is not owed."""
        inits = dig(pod, "status", "initContainerStatuses") or []
        running = [status["name"] for status in inits if dig(status, "state", "running") is not None]
        container = running[0] if running else dig(pod, "spec", "containers")[0]["name"]
        try:
            return self._cluster.log_tail(self._namespace, pod["metadata"]["name"], container)
        except ClusterError:
            return ""


def _is_starting(pod: Object) -> bool:
    statuses = [*(dig(pod, "status", "initContainerStatuses") or ()), *(dig(pod, "status", "containerStatuses") or ())]
    running = any(dig(status, "state", "running") is not None for status in statuses)
    return running and condition(pod, "Ready").get("status") != "True"
