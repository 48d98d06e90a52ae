"""An image registry and a model hub in one HTTP server, limited to the requests that preflight sends.

The registry follows the OCI distribution specification 1.1 (manifests, blobs, bearer tokens).
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DIGEST = "sha256:" + "a" * 64
INDEX = "application/vnd.oci.image.index.v1+json"
LOGIN = base64.b64encode(b"user:password").decode()


@dataclass
class Artifacts:
    """The contents of the server; a test changes them before its requests."""

    host: str = ""
    platforms: tuple[str, ...] = ("linux/amd64", "linux/arm64")
    private: bool = False
    """Whether the registry issues bearer tokens only for user and password."""
    has_image: bool = True
    single: bool = False
    """Whether the image has a single manifest without an index."""
    repository_status: int = 200
    tokens: list[str] = field(default_factory=list)
    """The Authorization headers that the hub received."""

    @property
    def image(self) -> str:
        return f"{self.host}/mistral-7b-kserve"


@contextmanager
def serving_artifacts() -> Iterator[Artifacts]:
    """Serve on loopback."""
    held = Artifacts()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            held.tokens.append(self.headers.get("authorization", ""))
            self.send_response(held.repository_status)
            self.end_headers()

        def do_GET(self) -> None:
            authorization = self.headers.get("authorization", "")
            if self.path.startswith("/token"):
                granted = authorization == f"Basic {LOGIN}"
                self._json({"token": "granted"} if granted else {}, 200 if granted else 401)
            elif held.private and authorization != "Bearer granted":
                realm = f'Bearer realm="http://{held.host}/token",service="registry",scope="pull"'
                self._json({}, 401, {"www-authenticate": realm})
            elif "/blobs/" in self.path:
                system, architecture = held.platforms[0].split("/")
                self._json({"os": system, "architecture": architecture})
            elif not held.has_image:
                self._json({}, 404)
            else:
                self._json(self._manifest(), 200, {"docker-content-digest": DIGEST})

        def _manifest(self) -> dict[str, object]:
            if held.single:
                return {"config": {"digest": DIGEST}}
            pairs = [platform.split("/") for platform in held.platforms]
            platforms = [{"os": system, "architecture": architecture} for system, architecture in pairs]
            return {"mediaType": INDEX, "manifests": [{"platform": each} for each in platforms]}

        def _json(self, body: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    held.host = f"127.0.0.1:{server.server_port}"
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
