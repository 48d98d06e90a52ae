"""A small server that streams the requested number of words: `python -m tests.support.counting_server PORT`."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        count = json.loads(self.rfile.read(int(self.headers["content-length"])))["max_new_tokens"]
        self.do_GET()
        for _ in range(count):
            self._send({"text": "a "})
        self._send({"text": "", "finish_reason": "length", "prompt_tokens": 4, "completion_tokens": count})

    def _send(self, event: dict[str, object]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, *args: object) -> None:
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
