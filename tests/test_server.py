"""The end of the process, seen from outside: a real `Server` with a scripted model, and real signals."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest

SCRIPT = """
import asyncio, sys
import kserve
from kserve.model_server import parser
from model_server.errors import Draining
from model_server.http import wrap
from model_server.routes import create_app
from model_server.server import Server
from model_server.settings import Settings

class Scripted(kserve.Model):
    dead = None
    running = 0
    accepting = True

    async def healthy(self):
        return self.accepting

    async def predict(self, payload, headers):
        if not self.accepting:
            raise Draining("Shutting down.")
        return self.stream()

    async def stream(self):
        self.running += 1
        yield b"data: begun\\n\\n"
        while self.accepting:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        yield b"data: [DONE]\\n\\n"
        self.running -= 1

    async def drain(self, seconds):
        self.accepting = False
        print("draining", flush=True)
        while self.running:
            await asyncio.sleep(0.01)

settings = Settings.parse(["--http_port", sys.argv.pop()], {}, parser)
model = Scripted(settings.model_name)
model.load()
app = create_app(model, client_stall_s=30)
wrap(app, max_request_bytes=1000)
Server(model, app, settings).run()
"""


@contextlib.contextmanager
def running_server() -> Iterator[tuple[subprocess.Popen, httpx.Client]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for line in process.stderr:
            if "Uvicorn running" in line:
                break
        drained = threading.Thread(target=process.stderr.read, daemon=True)
        drained.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_lets_a_stream_finish_and_refuses_new_requests(sig):
    with running_server() as (process, client):
        predict = ("POST", "/v1/models/mistral-7b:predict")
        with client.stream(*predict, json={}) as stream:
            chunks = stream.iter_text()
            next(chunks)
            process.send_signal(sig)
            assert "draining\n" in process.stdout
            refused = client.request(*predict, json={})
            assert (refused.status_code, refused.json()["code"]) == (503, "draining")
            assert "retry-after" in refused.headers
            assert client.get("/v1/models/mistral-7b").status_code == 503
            assert client.get("/v2/health/live").status_code == 200
            assert "".join(chunks).endswith("data: [DONE]\n\n")
        assert process.wait(10) == 0


def test_second_signal_ends_the_process_at_once():
    with (
        running_server() as (process, client),
        client.stream("POST", "/v1/models/mistral-7b:predict", json={}),
    ):
        process.send_signal(signal.SIGTERM)
        assert "draining\n" in process.stdout
        process.send_signal(signal.SIGTERM)
        assert process.wait(0.4) == 128 + signal.SIGTERM


def test_startup_error_is_one_line_and_exit_code_1():
    run = subprocess.run(
        [sys.executable, "-m", "model_server", "--dtype", "int8"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr == "error: --dtype: must be one of auto, float16, bfloat16, float32, not 'int8'.\n"
