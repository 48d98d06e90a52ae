"""The server's address: a URL, or an InferenceService by name.

The URL of an InferenceService is read from its `.status.url` and never computed: the host depends on the
ingress. Only `from_service` needs the `kubernetes` package, and only when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from .exit_codes import Misused, Unreachable

GetService = Callable[[str, str], Mapping[str, Any]]
"""(namespace, name) to the InferenceService object; raises `Unreachable` when there is none."""


@dataclass(frozen=True)
class Endpoint:
    """The URL, the headers and the TLS name for requests to one server."""

    base_url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    extensions: Mapping[str, str] = field(default_factory=dict)
    """httpx's request extensions: the name to ask for in TLS, where it is not the URL's."""

    def url(self, path: str) -> str:
        return self.base_url.rstrip("/") + path


def from_url(url: str) -> Endpoint:
    """Return the endpoint of a plain URL; without a scheme it means http.

    Raises:
        Misused: no host can be read from it.
    """
    url = url if "://" in url else f"http://{url}"
    try:
        parts = httpx.URL(url)
        urlsplit(url).port  # noqa: B018 - httpx lets a port above 65535 through, to fail in the socket
    except (httpx.InvalidURL, ValueError) as error:
        raise Misused(f"{url!r} is not a URL: {error}.") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise Misused(f"{url!r} is not an http or https URL with a host.")
    return Endpoint(url)


def from_service(service: str, ingress: str | None, get: GetService | None = None) -> Endpoint:
    """Return the endpoint of `NAMESPACE/NAME`, through `ingress` where its own URL is out of reach.

    Raises:
        Misused: the name or the ingress is not of the right form.
        Unreachable: the cluster does not answer, has no such InferenceService, or gave it no URL yet.
    """
    namespace, slash, name = service.partition("/")
    if not (namespace and slash and name) or "/" in name:
        raise Misused(f"{service!r} is not NAMESPACE/NAME.")
    url = _status_url((get or _get_from_cluster)(namespace, name), service)
    if ingress is None:
        return from_url(url)
    entry, wanted = from_url(ingress), urlsplit(url)
    # The ingress routes by Host, and behind TLS by the name asked for in the handshake; a path prefix stays.
    return Endpoint(
        entry.base_url.rstrip("/") + wanted.path,
        {"Host": wanted.netloc},
        {"sni_hostname": wanted.hostname or ""} if entry.base_url.startswith("https:") else {},
    )


def _status_url(inference_service: Mapping[str, Any], service: str) -> str:
    status = inference_service.get("status") or {}
    if url := status.get("url"):
        return str(url)
    conditions = {condition.get("type"): condition for condition in status.get("conditions") or []}
    ready = conditions.get("Ready", {})
    reason = ready.get("message") or ready.get("reason") or "its controller has not reported a status"
    raise Unreachable(f"The InferenceService {service} has no URL yet: {reason}.")


def _get_from_cluster(namespace: str, name: str) -> Mapping[str, Any]:
    """Read one InferenceService with the current kubeconfig, or as a pod with its service account."""
    try:
        from kubernetes import client, config  # an extra, and slow to import
        from urllib3.exceptions import HTTPError
    except ImportError as error:
        raise Unreachable(
            "--service needs the Python package `kubernetes` (pip install kubernetes); "
            "or read the URL with kubectl and pass it as --url."
        ) from error
    try:
        config.load_config()
        # No retries: an error of the cluster is reported at once.
        configuration = client.Configuration.get_default_copy()
        configuration.retries = False
        api = client.CustomObjectsApi(client.ApiClient(configuration))
        found: Any = api.get_namespaced_custom_object(
            "serving.kserve.io", "v1beta1", namespace, "inferenceservices", name, _request_timeout=30
        )
        return found
    except config.ConfigException as error:
        raise Unreachable(f"No cluster could be found: {error}") from error
    except client.ApiException as error:
        raise Unreachable(_api_sentence(error, namespace, name)) from error
    except HTTPError as error:
        raise Unreachable(f"The cluster {configuration.host} does not answer: {error}") from error


def _api_sentence(error: Any, namespace: str, name: str) -> str:
    if error.status == 404:
        return f"There is no InferenceService {name} in namespace {namespace} (or KServe is not installed)."
    if error.status in (401, 403):
        return f"The cluster does not let you read InferenceServices in namespace {namespace} ({error.reason})."
    return f"The cluster answered {error.status} {error.reason} for InferenceService {namespace}/{name}."
