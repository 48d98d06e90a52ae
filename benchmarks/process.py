"""Child processes that are measured: started, awaited, suspended, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

START_LIMIT_S = 180
"""Time limit for a program to become ready or to answer for the first time."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class ProgramFailed(RuntimeError):
    """A program ended, or it did not become ready or answer in time; the message ends with the end of its log."""


class Program:
    """A child process with its log: stopped at the end of the `with` block, killed if its parent is."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._command = list(command)
        self._environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}

    def __enter__(self) -> Program:
        self._log = tempfile.TemporaryFile(mode="w+b")
        self.started_s = time.perf_counter()
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._send(signal.SIGTERM)
            self.resume()  # a suspended process handles no signal
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
        finally:
            self._send(signal.SIGKILL)  # its own children as well
            self._process.wait()
            self._log.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        """Return its output so far."""
        return os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")

    def failure(self, sentence: str) -> ProgramFailed:
        """Return an error of this sentence and the end of the log."""
        return ProgramFailed(f"{sentence} Its log ends:\n" + "\n".join(self.log().splitlines()[-30:]))

    def wait_until_ready(self, port: int, path: str, limit_s: float) -> float:
        """Return the seconds from the start until `path` answered 200."""
        while time.perf_counter() - self.started_s < limit_s:
            if not self.running:
                raise self.failure(f"{self._command[0]} exited with {self._process.returncode}.")
            if _answers_200(port, path):
                return time.perf_counter() - self.started_s
            time.sleep(0.01)
        raise self.failure(f"No 200 on {path} within {limit_s:.0f} s.")

    def wait_for_exit(self, limit_s: float) -> float:
        """Return the seconds until it exited by itself; another exit code than 0 is an error."""
        try:
            code = self._process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise self.failure(f"Still running after {limit_s:.0f} s.") from None
        if code != 0:
            raise self.failure(f"Exited with {code}.")
        return time.perf_counter() - self.started_s

    def suspend(self) -> None:
        """Stop it until `resume`: it keeps its memory and its port and takes no CPU time."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def peak_memory_bytes(self) -> int:
        """Return the kernel's high-water marks of resident memory, summed over its processes."""
        kib, parent = 0, psutil.Process(self.pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
                kib += sum(map(int, re.findall(r"^VmHWM:\s+(\d+)", status, re.MULTILINE)))
        return 1024 * kib

    def _send(self, signum: signal.Signals) -> None:
        """Send a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers_200(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
