"""Child processes that are measured: started, awaited, read from /proc, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

import psutil

START_LIMIT_S = 180
"""Time limit for a program to become ready or to answer for the first time."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class StartFailed(RuntimeError):
    """A program did not become ready; the message ends with the end of its log."""


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
            preexec_fn=_die_with_parent,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _signal_group(self._process, signal.SIGTERM)
            self.thaw()  # a stopped process handles no signal
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
        finally:
            _signal_group(self._process, signal.SIGKILL)  # its own children as well
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

    def wait_until_ready(self, port: int, path: str, limit_s: float) -> float:
        """Return the seconds from the start until `path` answered 200."""
        while time.perf_counter() - self.started_s < limit_s:
            if not self.running:
                raise StartFailed(f"{self._command[0]} exited with {self._process.returncode}. {self.log_end()}")
            if _answers_200(port, path):
                return time.perf_counter() - self.started_s
            time.sleep(0.01)
        raise StartFailed(f"No 200 on {path} within {limit_s:.0f} s. {self.log_end()}")

    def exit_code(self, limit_s: float) -> int:
        """Wait until it has exited by itself."""
        try:
            return self._process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise StartFailed(f"Still running after {limit_s:.0f} s. {self.log_end()}") from None

    def wait_for_exit(self, limit_s: float) -> float:
        """Return the seconds until it exited by itself; another exit code than 0 is an error."""
        code = self.exit_code(limit_s)
        if code != 0:
            raise StartFailed(f"Exited with {code}. {self.log_end()}")
        return time.perf_counter() - self.started_s

    def freeze(self) -> None:
        """Stop it until `thaw`: it keeps its memory and its port and takes no CPU time."""
        _signal_group(self._process, signal.SIGSTOP)

    def thaw(self) -> None:
        _signal_group(self._process, signal.SIGCONT)

    def peak_memory_bytes(self) -> int:
        """Return the kernel's high-water marks of resident memory, summed over its processes."""
        parent = psutil.Process(self.pid)
        return sum(_peak_memory_bytes(process.pid) for process in [parent, *parent.children(recursive=True)])

    def log_end(self) -> str:
        return "Its log ends:\n" + "\n".join(self.log().splitlines()[-30:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop_children_on_sigterm() -> None:
    """Make SIGTERM unwind the stack as Ctrl-C does, so that every `with` block stops its program."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, leave)


def _peak_memory_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def _answers_200(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
