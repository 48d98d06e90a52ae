"""A real HTTP server on a loopback socket that plays a script for clients, one act per request."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DONE = b"data: [DONE]\n\n"


@dataclass
class Asked:
    """A received request."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


Act = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class ScriptedServer:
    """Plays `acts` in turn and repeats the last one; answers `GET /v1/models` without an act. Use it in `with`."""

    acts: list[Act]
    models: list[str] = field(default_factory=lambda: ["mistral-7b"])
    pages: dict[str, Act] = field(default_factory=dict)
    """Maps GET paths to acts."""
    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    """Every POST, in order."""

    def __enter__(self) -> ScriptedServer:
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                pages = {"/v1/models": answer_json({"models": script.models}), **script.pages}
                pages.get(self.path, answer_json({"error": "No such page."}, 404))(self)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                script.asked.append(Asked("POST", self.path, headers, json.loads(body)))
                script.acts[min(len(script.asked), len(script.acts)) - 1](self)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def answer_json(body: Any, status: int = 200, **headers: str) -> Act:
    """Answer with JSON; header names are written with underscores."""
    return answer_bytes(json.dumps(body).encode(), status, content_type="application/json", **headers)


def answer_bytes(body: bytes, status: int = 200, **headers: str) -> Act:
    """Answer with these bytes."""

    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return act


def predictions(*texts: str) -> Act:
    """Answer as `:predict` does without `stream`."""
    return answer_json(
        {
            "predictions": [
                {"generated_text": t, "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 4}
                for t in texts
            ]
        }
    )


def event(text: str, **more: Any) -> bytes:
    """Return one `data:` event as `:predict` streams it."""
    return b"data: " + json.dumps({"text": text, **more}, ensure_ascii=False).encode() + b"\n\n"


def last_event(tokens: int, finish_reason: str = "stop", **more: Any) -> bytes:
    """Return the event that ends the text."""
    return event("", finish_reason=finish_reason, prompt_tokens=3, completion_tokens=tokens, **more)


def error_event(sentence: str, code: str = "internal") -> bytes:
    """Return the error event of a stream that has begun."""
    return b"event: error\ndata: " + json.dumps({"error": sentence, "code": code}).encode() + b"\n\n"


def stream(*chunks: bytes, then: Act | None = None, whole: bool = True) -> Act:
    """Stream chunks as an event stream; `then` runs after them; `whole=False` drops the connection at the end."""

    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for chunk in chunks:
            send_chunk(handler, chunk)
        if then is not None:
            then(handler)
        if whole:
            handler.wfile.write(b"0\r\n\r\n")
        else:
            hang_up(handler)

    return act


def send_chunk(handler: BaseHTTPRequestHandler, chunk: bytes) -> None:
    """Write one chunk of a chunked body."""
    handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
    handler.wfile.flush()


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """Drop the connection without sending another byte."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def after(event_: threading.Event, act: Act) -> Act:
    """Wait until the test sets the event, then act."""

    def wait(handler: BaseHTTPRequestHandler) -> None:
        assert event_.wait(30)
        act(handler)

    return wait


def until_gone(gone: threading.Event, chunks: Iterable[bytes]) -> Act:
    """Send chunks until the reader has disconnected, then set the event."""

    def act(handler: BaseHTTPRequestHandler) -> None:
        pace = threading.Event()
        try:
            for chunk in chunks:
                send_chunk(handler, chunk)
                pace.wait(0.01)
        except OSError:
            handler.close_connection = True
            gone.set()

    return act
