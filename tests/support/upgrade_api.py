"""A Kubernetes API over HTTP for `helm upgrade` and `kubectl patch`, with KServe's traffic rule.

It stores objects, merges patches and streams changes. It imitates kube-apiserver's REST paths and validates nothing.
A new revision becomes ready when the test calls `become_ready`.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.support import protobuf_secret
from tests.support.traffic_rule import Knative, reconcile

RESOURCES = {
    "v1": {"secrets": "Secret", "serviceaccounts": "ServiceAccount", "configmaps": "ConfigMap"},
    "serving.kserve.io/v1beta1": {"inferenceservices": "InferenceService"},
    "serving.kserve.io/v1alpha1": {"clusterstoragecontainers": "ClusterStorageContainer"},
}
CLUSTER_SCOPED = {"clusterstoragecontainers"}
SERVICE = "/apis/serving.kserve.io/v1beta1/namespaces/mistral/inferenceservices/mistral-7b"


class UpgradeApi:
    """The server, its objects by path, and the Knative Service of the only InferenceService."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.version = 0
        self.changed = threading.Condition()
        self.knative = Knative("mistral-7b-predictor")
        handler = type("Handler", (_Handler,), {"api": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def write_kubeconfig(self, path: Path) -> None:
        """Write the file that KUBECONFIG names."""
        cluster = {"name": "double", "cluster": {"server": f"http://127.0.0.1:{self.server.server_port}"}}
        context = {"name": "double", "context": {"cluster": "double", "user": "double"}}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "double"}
        users = [{"name": "double", "user": {}}]
        path.write_text(yaml.safe_dump({**config, "clusters": [cluster], "contexts": [context], "users": users}))

    def become_ready(self) -> None:
        """Make the newest revision ready."""
        self.knative.ready.add(self.knative.created)
        self.store(SERVICE, self.objects[SERVICE])

    def traffic(self) -> dict[str, int]:
        """Return the percentage of each image that gets traffic."""
        status = self.objects[SERVICE]["status"]["components"]["predictor"]
        shares: dict[str, int] = {}
        for target in status["traffic"]:
            image = self.knative.image(target["revisionName"])
            shares[image] = shares.get(image, 0) + target["percent"]
        return {image: percent for image, percent in shares.items() if percent}

    def store(self, path: str, value: Any) -> Any:
        """Store an object as the API server does, with a resource version and KServe's status."""
        with self.changed:
            self.version += 1
            metadata = value.setdefault("metadata", {})
            metadata["resourceVersion"] = str(self.version)
            metadata.setdefault("uid", f"uid-{self.version}")
            if path == SERVICE:
                reconcile(value, self.knative)
            self.objects[path] = value
            self.changed.notify_all()
        return value


class _Handler(BaseHTTPRequestHandler):
    api: UpgradeApi
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Write nothing to stderr."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if (found := _discovery(url.path)) is not None:
            self._answer(200, found)
        elif url.path == "/openapi/v2":  # an empty document: nothing is validated
            self._send(200, b"")
        elif query.get("watch"):
            self._watch(url.path, query)
        elif url.path in self.api.objects:
            self._answer(200, self.api.objects[url.path])
        elif url.path.rsplit("/", 1)[-1] in {plural for group in RESOURCES.values() for plural in group}:
            items = [o for path, o in sorted(self.api.objects.items()) if _selected(path, o, url.path, query)]
            self._answer(200, _list(url.path, self.api.version, items))
        else:
            self._missing()

    def do_POST(self) -> None:
        body = self._object()
        path = f"{urlsplit(self.path).path}/{body['metadata']['name']}"
        self._answer(201, self.api.store(path, body))

    def do_PUT(self) -> None:
        self._answer(200, self.api.store(urlsplit(self.path).path, self._object()))

    def do_PATCH(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        old = self.api.objects.get(path)
        if old is None:
            self._missing()
        elif self.headers["Content-Type"] == "application/json-patch+json":
            self._answer(200, self.api.store(path, _json_patch(json.loads(json.dumps(old)), json.loads(body))))
        else:
            self._answer(200, self.api.store(path, _merge(old, json.loads(body))))

    def do_DELETE(self) -> None:
        self.api.objects.pop(urlsplit(self.path).path, None)
        self._body()
        self._answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _watch(self, collection: str, query: dict[str, str]) -> None:
        if "sendInitialEvents" in query:  # imitates an API server without the feature WatchList
            self._answer(
                422, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid", "code": 422}
            )
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        seen = int(query.get("resourceVersion") or 0)
        while True:
            with self.api.changed:
                self.api.changed.wait_for(lambda seen=seen: self.api.version > seen, timeout=30)
                changed = [
                    o
                    for path, o in self.api.objects.items()
                    if _selected(path, o, collection, query) and int(o["metadata"]["resourceVersion"]) > seen
                ]
                seen = self.api.version
            try:
                for o in changed:
                    self.wfile.write(json.dumps({"type": "MODIFIED", "object": o}).encode() + b"\n")
                self.wfile.flush()
            except OSError:
                return

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _object(self) -> Any:
        body = self._body()
        return protobuf_secret.decode(body) if body.startswith(protobuf_secret.MAGIC) else json.loads(body)

    def _missing(self) -> None:
        self._answer(
            404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        )

    def _answer(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _discovery(path: str) -> Any:
    if path == "/version":
        return {"major": "1", "minor": "35", "gitVersion": "v1.35.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups: dict[str, list[dict[str, str]]] = {}
        for group, version in (name.split("/") for name in RESOURCES if "/" in name):
            groups.setdefault(group, []).append({"groupVersion": f"{group}/{version}", "version": version})
        listed = [{"name": g, "versions": versions, "preferredVersion": versions[0]} for g, versions in groups.items()]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    name = path.removeprefix("/apis/").removeprefix("/api/")
    if name not in RESOURCES:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {"name": plural, "kind": kind, "namespaced": plural not in CLUSTER_SCOPED, "verbs": verbs, "singularName": ""}
        for plural, kind in RESOURCES[name].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": resources}


def _list(path: str, version: int, items: list[Any]) -> dict[str, Any]:
    plural = path.rsplit("/", 1)[-1]
    [(group, kind)] = [(group, kinds[plural]) for group, kinds in RESOURCES.items() if plural in kinds]
    return {"kind": f"{kind}List", "apiVersion": group, "metadata": {"resourceVersion": str(version)}, "items": items}


def _selected(path: str, o: Any, collection: str, query: dict[str, str]) -> bool:
    if path.rsplit("/", 1)[0] != collection:
        return False
    labels = o["metadata"].get("labels", {})
    wanted = [pair.split("=", 1) for pair in query.get("labelSelector", "").split(",") if pair]
    names = [pair.split("=", 1)[1] for pair in query.get("fieldSelector", "").split(",") if pair]
    return all(labels.get(key) == value for key, value in wanted) and all(o["metadata"]["name"] == n for n in names)


def _merge(old: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged


def _json_patch(value: Any, operations: list[dict[str, Any]]) -> Any:
    for operation in operations:
        *parents, last = [int(p) if p.isdigit() else p for p in operation["path"].split("/")[1:]]
        at = value
        for part in parents:
            at = at[part]
        if operation["op"] == "remove":
            del at[last]
        else:
            at[last] = operation["value"]
    return value
