"""The ingress of the cluster double, over real HTTP: routes by `Host` and answers as the routed image would."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .knative import World

WORDS = ("Paris", " is", " a", " city", " on", " the", " Seine", ".")


@dataclass(frozen=True)
class Behaviour:
    """The behaviour of an image's model server."""

    words: tuple[str, ...] = WORDS
    status: int = 200
    cut: bool = False
    """Whether the stream ends without its end marker."""
    first_s: float = 0.0
    word_s: float = 0.0


GOOD = Behaviour()
NONSENSE = Behaviour(words=("blue", " blue", " blue", " blue", " blue", " blue", " blue", " blue"))
FAILING = Behaviour(status=500)
CUTTING = Behaviour(cut=True)


@dataclass
class Gateway:
    """Routes requests by the world's route."""

    world: World
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    """Requests by image."""
    url: str = ""

    def image_for(self, host: str) -> str | None:
        """Return the image that answers a request with this host."""
        with self.world.store.lock:
            images = self.world.images_by_revision()
            tag = next((t for t in self.world.route if host.startswith(f"{t['tag']}-")), None)
            if tag is not None:
                return images.get(tag["revisionName"])
            if host.split("-", 1)[0] in ("latest", "prev"):
                return None
            users = [t for t in self.world.route if t["percent"]]
            return images.get(max(users, key=lambda t: t["percent"])["revisionName"]) if users else None


@contextmanager
def serving(world: World) -> Iterator[Gateway]:
    """Serve the gateway."""
    gateway = Gateway(world)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._json({"models": ["mistral-7b"]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            image = gateway.image_for(self.headers["host"])
            if image is None:
                self._json({"error": "no such host"}, 404)
                return
            with gateway.world.store.lock:
                gateway.asked[image] += 1
            behaviour = gateway.behaviours.get(image, GOOD)
            if behaviour.status != 200:
                self._json({"error": "it failed", "code": "internal"}, behaviour.status)
                return
            self._stream(behaviour)

        def _stream(self, behaviour: Behaviour) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            time.sleep(behaviour.first_s)
            for word in behaviour.words:
                self._event({"text": word})
                time.sleep(behaviour.word_s)
            if not behaviour.cut:
                self._event({"text": "", "finish_reason": "length", "prompt_tokens": 3, "completion_tokens": 8})
                self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

        def _event(self, data: Any) -> None:
            self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
            self.wfile.flush()

        def _json(self, body: Any, status: int = 200) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    gateway.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield gateway
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
