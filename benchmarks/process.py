"""Programs that are measured: started, awaited, read from /proc, and stopped whatever happens."""

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
from types import FrameType, TracebackType

import psutil

START_LIMIT_S = 180
"""What any program may take until it is ready, or has answered for the first time."""
REST_S = 0.5
"""A program that takes less than a tenth of a core for so long is at rest."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class StartFailed(RuntimeError):
    """A program did not become ready; the message ends with the end of its log."""


class Program:
    """A child process with its log: stopped at the end of the `with` block, and dead if we are killed."""

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
            self.thaw()  # a frozen program would never hear of it
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
        finally:
            _signal_group(self._process, signal.SIGKILL)  # what it may have started itself, too
            self._process.wait()
            self._log.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        """Return all it has printed so far."""
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

    def wait_for_exit(self, limit_s: float) -> float:
        """Return the seconds that a program took which ends by itself; an unclean end is an error."""
        try:
            code = self._process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise StartFailed(f"Still running after {limit_s:.0f} s. {self.log_end()}") from None
        if code != 0:
            raise StartFailed(f"Exited with {code}. {self.log_end()}")
        return time.perf_counter() - self.started_s

    def freeze(self) -> None:
        """Stop it where it is, until `thaw`: it keeps its memory and its ports, and takes no processor time."""
        _signal_group(self._process, signal.SIGSTOP)

    def thaw(self) -> None:
        _signal_group(self._process, signal.SIGCONT)

    def comes_to_rest(self, within_s: float) -> bool:
        """Wait until it takes no more processor time; say whether it did."""
        deadline_s = time.perf_counter() + within_s
        while time.perf_counter() < deadline_s:
            before_s = self._processor_s()
            time.sleep(REST_S)
            if self._processor_s() - before_s < 0.1 * REST_S:
                return True
        return False

    def _processor_s(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def memory_bytes(self) -> dict[str, int]:
        """Return resident memory: the `peak`, what there is `now`, and how much of it is `anonymous`."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        kib = dict(re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE))
        names = {"peak": "VmHWM", "now": "VmRSS", "anonymous": "RssAnon"}
        return {ours: int(kib[theirs]) * 1024 for ours, theirs in names.items()}

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
