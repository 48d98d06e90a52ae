"""A server that answers one request at a time, with `model.generate` in a thread and a `TextIteratorStreamer`.

It stands for a Truss whose `predict` streams, with Truss's default `predict_concurrency` of 1. The stream has the
format of this server's V1, so that the comparison is of generation alone.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


def make_server(model_dir: str, port: int) -> ThreadingHTTPServer:
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    one_at_a_time = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            inputs = tokenizer(body["prompt"], return_tensors="pt")
            self.do_GET()
            with one_at_a_time:
                streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                options = {"max_new_tokens": body["max_new_tokens"], "do_sample": False, "streamer": streamer}
                outputs: list[Any] = []
                thread = Thread(target=lambda: outputs.append(model.generate(**inputs, **options)), daemon=True)
                thread.start()
                for text in streamer:
                    if text:
                        self.send({"text": text})
                thread.join()
            completion_tokens = outputs[0].shape[1] - inputs.input_ids.shape[1]
            self.send({"text": "", "finish_reason": "length", "completion_tokens": completion_tokens})

        def send(self, event: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

        def log_message(self, *args: object) -> None:
            pass

    ThreadingHTTPServer.request_queue_size = 128  # connections that wait to be accepted; the default is 5
    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    make_server(sys.argv[1], int(sys.argv[2])).serve_forever()
