"""The Kubernetes API as plain objects, and the only import of the `kubernetes` client for rollouts and preflight.

The client supplies the credentials (kubeconfig, exec plugins, client certificates) and the connection with its
retries. Objects are dicts, as the API sends them: custom resources have no classes, and one form is enough.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from mistral_cli.objects import Object

RETRIED = (429, 500, 502, 503, 504)
"""Statuses to retry. The API server answers 500 while a webhook restarts."""


NO_CLIENT = "The Python package `kubernetes` is missing: pip install '.[rollout]' in the project's directory."


class ClusterError(Exception):
    """The API server refused, or did not answer. `str(error)` is its sentence."""


class Unreachable(ClusterError):
    """No kubeconfig, no such context, or no answer."""


class Forbidden(ClusterError):
    """403: the sentence names the missing right."""


class Unauthenticated(Forbidden):
    """401: the token or the certificate is not valid, or has expired."""


class NotFound(ClusterError):
    """404."""


class Conflict(ClusterError):
    """409: the object exists already, or has changed since it was read."""


class Rejected(ClusterError):
    """Any other refusal: a webhook, a schema, a quota."""


@dataclass(frozen=True)
class Kind:
    """Where one kind of object lives in the API."""

    group_version: str
    plural: str

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        root = f"/api/{self.group_version}" if "/" not in self.group_version else f"/apis/{self.group_version}"
        parts = [root, *(["namespaces", namespace] if namespace else []), self.plural]
        return "/".join(part for part in (*parts, name, subresource) if part)


INFERENCE_SERVICE = Kind("serving.kserve.io/v1beta1", "inferenceservices")
REVISION = Kind("serving.knative.dev/v1", "revisions")
HTTP_ROUTE = Kind("gateway.networking.k8s.io/v1", "httproutes")
DEPLOYMENT = Kind("apps/v1", "deployments")
LEASE = Kind("coordination.k8s.io/v1", "leases")
POD = Kind("v1", "pods")
EVENT = Kind("v1", "events")
QUOTA = Kind("v1", "resourcequotas")
NODE = Kind("v1", "nodes")
CONFIG_MAP = Kind("v1", "configmaps")
SECRET = Kind("v1", "secrets")


def only_context() -> str:
    """Return the kubeconfig's context, where there is exactly one to choose from.

    Raises:
        Unreachable: the client is not installed, or the kubeconfig has no context.
        ValueError: it has several; the current one is not taken, because it may be another cluster's.
    """
    try:
        from kubernetes import config
    except ImportError as error:
        raise Unreachable(NO_CLIENT) from error
    try:
        contexts, _ = config.list_kube_config_contexts(os.environ.get("KUBECONFIG"))
    except (config.ConfigException, OSError) as error:
        raise Unreachable(f"The kubeconfig cannot be used: {error}") from error
    names = [str(context["name"]) for context in contexts]
    if len(names) != 1:
        raise ValueError(f"The kubeconfig has {len(names)} contexts ({', '.join(names)}): name one with --context.")
    return names[0]


class Cluster:
    """One API server, reached as one context of the kubeconfig says."""

    def __init__(
        self, context: str, *, config_file: str | None = None, retries: int = 6, timeout_s: float = 30
    ) -> None:
        """Read the kubeconfig and keep `context` of it.

        Raises:
            Unreachable: the client is not installed, or the kubeconfig has no such context.
        """
        try:
            from kubernetes import client, config
            from urllib3 import Retry
        except ImportError as error:
            raise Unreachable(NO_CLIENT) from error
        # The client reads KUBECONFIG once, when it is imported: a later value would be ignored.
        config_file = config_file or os.environ.get("KUBECONFIG")
        settings = client.Configuration()
        settings.retries = Retry(
            total=retries, backoff_factor=0.3, backoff_max=8, status_forcelist=RETRIED, allowed_methods=None,
            raise_on_status=False,
        )  # fmt: skip
        try:
            config.load_kube_config(config_file, context, settings)
        except (config.ConfigException, OSError) as error:
            raise Unreachable(f"No cluster could be found: {error}") from error
        self.namespace = _namespace(config_file or config.KUBE_CONFIG_DEFAULT_LOCATION, context)
        self.host: str = settings.host
        self._timeout_s = timeout_s
        self._api = client.ApiClient(settings)

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object:
        return self._request("GET", kind.path(namespace, name))

    def list(self, kind: Kind, namespace: str | None = None, **query: str) -> list[Object]:
        return list(self._request("GET", kind.path(namespace), query).get("items") or [])

    def create(self, kind: Kind, namespace: str | None, body: Object, *, dry_run: bool = False) -> Object:
        query = {"dryRun": "All", "fieldValidation": "Strict"} if dry_run else {}
        return self._request("POST", kind.path(namespace), query, body)

    def replace(self, kind: Kind, namespace: str, name: str, body: Object, *, dry_run: bool = False) -> Object:
        """Replace an object; its `resourceVersion` makes a stale copy a Conflict."""
        query = {"dryRun": "All", "fieldValidation": "Strict"} if dry_run else {}
        return self._request("PUT", kind.path(namespace, name), query, body)

    def read(self, path: str) -> Object:
        """Return what lies at a path that is no object: `/version`, or the kinds of one API version."""
        return self._request("GET", path)

    def merge(
        self, kind: Kind, namespace: str, name: str, patch: Object, *, manager: str, dry_run: bool = False
    ) -> Object:
        """Send a JSON merge patch: null deletes a key, a list replaces the whole list."""
        query = {"fieldManager": manager, "fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        return self._request("PATCH", kind.path(namespace, name), query, patch, "application/merge-patch+json")

    def delete(self, kind: Kind, namespace: str, name: str) -> None:
        """Delete an object; one that is gone already is fine."""
        try:
            self._request("DELETE", kind.path(namespace, name), {"propagationPolicy": "Background"})
        except NotFound:
            return

    def log_tail(self, namespace: str, pod: str, container: str, lines: int = 5) -> str:
        path = POD.path(namespace, pod, "log")
        return self._send("GET", path, {"container": container, "tailLines": str(lines)}).decode(errors="replace")

    def _request(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: Any = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:  # fmt: skip
        answer: dict[str, Any] = json.loads(self._send(method, path, query or {}, body, content_type))
        return answer

    def _send(
        self, method: str, path: str, query: Mapping[str, str], body: Any = None, content_type: str = "application/json"
    ) -> bytes:
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json, */*", "Content-Type": content_type}
        self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        url = f"{self.host}{path}" + (f"?{urlencode(query)}" if query else "")
        payload = None if body is None else json.dumps(body)
        try:
            # The client's own `request` would serialise a string again as JSON: its pool is asked directly.
            response = self._api.rest_client.pool_manager.request(
                method, url, headers=headers, body=payload, timeout=self._timeout_s
            )
        except HTTPError as error:
            cause = getattr(error, "reason", None) or error  # the client wraps the last failure of several attempts
            raise Unreachable(f"The cluster {self.host} does not answer: {cause}") from error
        if response.status >= 300:
            raise _error(response.status, response.data, method, path)
        return bytes(response.data)


def _namespace(config_file: str, context: str) -> str:
    """Return a context's namespace. The client's own reader needs a current context, which nothing here uses."""
    for file in config_file.split(os.pathsep):
        path = Path(file).expanduser()
        said = yaml.safe_load(path.read_text("utf-8")) if path.exists() else None
        for entry in (said or {}).get("contexts") or ():
            if entry.get("name") == context:
                return str(entry["context"].get("namespace") or "default")
    return "default"


def _error(status: int, data: bytes, method: str, path: str) -> ClusterError:
    try:
        sentence = str(json.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        sentence = data.decode(errors="replace").strip()[:300] or f"{method} {path}"
    kinds: dict[int, type[ClusterError]] = {401: Unauthenticated, 403: Forbidden, 404: NotFound, 409: Conflict}
    kind = Unreachable if status in RETRIED else kinds.get(status, Rejected)
    # A quota and an admission webhook also answer 403; they are refusals of the object, not of the caller.
    if status == 403 and ("admission webhook" in sentence or "exceeded quota" in sentence):
        kind = Rejected
    if status == 401:
        sentence = f"The API server does not accept the credentials of the kubeconfig's context: {sentence}"
    return kind(f"{sentence} (HTTP {status})")
