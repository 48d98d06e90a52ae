"""Programs that are measured: stopped whatever happens, and read from /proc."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from benchmarks import start
from benchmarks.process import Program, StartFailed, free_port

SLEEPER = [sys.executable, "-c", "import time; print('awake', flush=True); time.sleep(600)"]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_program_is_stopped_when_its_block_raises() -> None:
    with pytest.raises(RuntimeError, match="ours"), Program(SLEEPER) as program:
        raise RuntimeError("ours")
    assert gone(program.pid)


def test_frozen_program_takes_no_time_until_it_is_thawed_and_ends_with_its_block() -> None:
    with Program([sys.executable, "-c", "while True: pass"]) as program:
        assert not program.comes_to_rest(within_s=0.1)
        program.freeze()
        assert program.comes_to_rest(within_s=60)
        program.thaw()
        assert not program.comes_to_rest(within_s=0.1)
        program.freeze()
    assert program._process.returncode == -signal.SIGTERM  # asked, and not killed after ten seconds


def test_program_that_exits_early_fails_with_the_end_of_its_log() -> None:
    with (
        pytest.raises(StartFailed, match=r"(?s)exited with 3.*no weights here"),
        Program([sys.executable, "-c", "print('no weights here'); exit(3)"]) as program,
    ):
        program.wait_until_ready(free_port(), "/ready", limit_s=60)


def test_program_that_never_answers_fails_at_the_limit() -> None:
    with pytest.raises(StartFailed, match="No 200 on /ready"), Program(SLEEPER) as program:
        program.wait_until_ready(free_port(), "/ready", limit_s=0.1)


def test_memory_of_a_program_is_read() -> None:
    with Program(SLEEPER) as program:
        memory = program.memory_bytes()
    assert memory["peak"] >= memory["now"] >= memory["anonymous"] > 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_programs_do_not_outlive_a_killed_benchmark(signum: signal.Signals) -> None:
    code = (
        "from benchmarks.process import Program, stop_children_on_sigterm\n"
        "import sys, time\n"
        "stop_children_on_sigterm()\n"
        "with Program([sys.executable, '-c', 'import time; time.sleep(600)']) as program:\n"
        "    print(program.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        child = os.pidfd_open(int(benchmark.stdout.readline()))
        try:
            benchmark.send_signal(signum)
            benchmark.wait(timeout=60)
            assert select.select([child], [], [], 60)[0] == [child]  # readable: it has ended
        finally:
            os.close(child)


def test_phases_are_read_from_a_servers_own_log() -> None:
    log = (
        "2025-01-01 INFO start: imports 1.92 s (total 1.92 s)\n"
        "INFO:kserve:start: warm-up 0.1 s (total 2.8 s)\n"
        "start: first token 3 s (total 5.8 s)\nrestart: never\n"
    )
    assert start.logged_phases(log) == {"imports": 1.92, "warm-up": 0.1, "first token": 3.0}
