"""Serves objects over HTTP as an API server does: merge patches, conflicts, dry runs, and errors on demand."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Object = dict[str, Any]
CONTEXT = "double"


@dataclass
class Fault:
    """An answer to the next matching requests, in place of the store's answer."""

    method: str
    part: str
    """The part of the path that must match."""
    status: int
    message: str
    times: int = 1
    retry_after: str | None = None


@dataclass
class Refusal(Exception):
    status: int
    message: str


@dataclass
class Store:
    """All objects by path, with resource versions and generations."""

    objects: dict[str, Object] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    """Method, path and body of every request."""
    logs: dict[str, str] = field(default_factory=dict)
    before: Callable[[str, str], None] = lambda method, path: None
    """Called before every request with method and path; it may raise to break the connection."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    _version: int = 100

    def put(self, path: str, thing: Object) -> Object:
        """Store an object as if a controller had written it."""
        self._version += 1
        metadata = thing.setdefault("metadata", {})
        parts = path.split("/")
        metadata.setdefault("name", parts[-1])
        if "namespaces" in parts:
            metadata.setdefault("namespace", parts[parts.index("namespaces") + 1])
        old = self.objects.get(path)
        changed = old is not None and old.get("spec") != thing.get("spec")
        metadata["generation"] = (old["metadata"]["generation"] + changed) if old else metadata.get("generation", 1)
        metadata["resourceVersion"] = str(self._version)
        self.objects[path] = thing
        return thing

    def under(self, path: str) -> list[Object]:
        return [thing for key, thing in sorted(self.objects.items()) if key.rpartition("/")[0] == path]

    def everywhere(self, path: str) -> list[Object]:
        """List one kind in all namespaces."""
        root, _, plural = path.rpartition("/")
        return [
            thing
            for key, thing in sorted(self.objects.items())
            if key.startswith(f"{root}/") and key.split("/")[-2] == plural
        ]

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        """Return the answer to one request, or raise the error that refuses it."""
        for fault in self.faults:
            if fault.times and method == fault.method and fault.part in path:
                fault.times -= 1
                raise Refusal(fault.status, fault.message)
        if method == "GET" and path.endswith("/log"):
            return self.logs.get(path.split("/")[-2], "")
        if method == "GET" and path in self.objects:
            return self.objects[path]
        if method == "GET" and path.rpartition("/")[2] in PLURALS:
            return {
                "items": [thing for thing in self._listed(path) if _selected(thing, query.get("labelSelector", ""))]
            }
        if method == "POST":
            key = f"{path}/{body['metadata']['name']}"
            if key in self.objects:
                raise Refusal(409, f'{path.rpartition("/")[2]} "{body["metadata"]["name"]}" already exists')
            return body if query.get("dryRun") else self.put(key, copy.deepcopy(body))
        if path not in self.objects:
            kind, name = path.split("/")[-2:]
            raise Refusal(404, f'{kind} "{name}" not found')
        return self._change(method, path, query, body)

    def _listed(self, path: str) -> list[Object]:
        return self.under(path) if "/namespaces/" in path else self.everywhere(path)

    def _change(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        current = self.objects[path]
        if method == "DELETE":
            return self.objects.pop(path)
        wanted = (body.get("metadata") or {}).get("resourceVersion")
        if wanted is not None and wanted != current["metadata"]["resourceVersion"]:
            raise Refusal(409, "the object has been modified; please apply your changes to the latest version")
        changed = merge(copy.deepcopy(current), body) if method == "PATCH" else copy.deepcopy(body)
        changed["status"] = current.get("status", {})  # status is a subresource: this request cannot change it
        if query.get("dryRun"):
            return changed
        if manager := query.get("fieldManager"):
            note_writer(changed, manager, body, self._version)
        return self.put(path, changed)


PLURALS = {
    "inferenceservices", "revisions", "pods", "events", "resourcequotas", "nodes", "leases", "deployments",
    "httproutes", "prometheuses", "storageclasses",
}  # fmt: skip


def note_writer(thing: Object, manager: str, patch: Any, time: int) -> None:
    """Update `managedFields`, limited to the fields that the code under test reads."""
    if "containers" in (patch.get("spec") or {}).get("predictor", {}):
        fields = {"f:spec": {"f:predictor": {"f:containers": {}}}}
        thing["metadata"].setdefault("managedFields", []).append(
            {"manager": manager, "time": f"2026-01-01T00:{time % 3600 // 60:02d}:{time % 60:02d}Z", "fieldsV1": fields}
        )


def merge(target: Any, patch: Any) -> Any:
    """Merge a patch by RFC 7386: null deletes, an object merges, and any other value, lists included, replaces."""
    if not isinstance(patch, dict):
        return patch
    if not isinstance(target, dict):
        target = {}
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        else:
            target[key] = merge(target.get(key), value)
    return target


def _selected(thing: Object, selector: str) -> bool:
    labels = thing["metadata"].get("labels", {})
    return all(
        labels.get(key) == value for key, _, value in (part.partition("=") for part in selector.split(",") if part)
    )


@contextmanager
def serve(store: Store, folder: Path) -> Iterator[Path]:
    """Serve a store on loopback; yield the path of a kubeconfig for it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet

        def handle_any(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            with store.lock:
                store.asked.append((self.command, url.path, body))
                try:
                    store.before(self.command, url.path)
                    status, answer = 200, store.answer(self.command, url.path, query, body)
                except Refusal as refusal:
                    status, answer = refusal.status, {"kind": "Status", "message": refusal.message}
                except ConnectionError:
                    self.close_connection = True
                    return
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield kubeconfig(folder, f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def kubeconfig(folder: Path, url: str) -> Path:
    """Write a kubeconfig whose only context is `double`."""
    file = folder / "kubeconfig"
    file.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": CONTEXT,
                "contexts": [{"name": CONTEXT, "context": {"cluster": "c", "user": "u", "namespace": "mistral"}}],
                "clusters": [{"name": "c", "cluster": {"server": url}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
            }
        )
    )
    return file
