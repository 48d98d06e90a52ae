"""Runs the server as a container does: `python -m model_server` in a separate process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx


class ServerProcess:
    """`python -m model_server` on the tiny model; `module` is another program with the same flags."""

    def __init__(
        self, model_dir: Path, *flags: str, environ: dict[str, str] | None = None, module: str = "model_server"
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", module, "--model_dir", str(model_dir), "--http_port", str(self.port)]
        command += ["--dtype", "float32", *flags]
        self.log_path = model_dir.parent / f"server-{self.port}.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})}
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_until_ready(self, seconds: float = 90) -> None:
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, self.log
            try:
                if httpx.get(f"{self.url}/v2/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(f"not ready after {seconds} s: {self.log}")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
