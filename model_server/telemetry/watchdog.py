"""End a process whose interpreter is stuck as a whole, and leave every thread's stack in the log.

A C call that never gives the interpreter's lock back stops every thread of Python, also the one that answers probes.
Knative replaces such a pod after more than ten minutes: the kubelet waits for the pod's grace period, which is the
request timeout there. faulthandler's timer is a C thread that needs no lock, so it can end the process instead.
"""

from __future__ import annotations

import asyncio
import faulthandler

_STDERR = 2
"""The process's own stderr, whatever `sys.stderr` has been replaced with."""


async def watch(stuck_s: float) -> None:
    """Postpone the timer while the event loop runs. When the loop stands still for `stuck_s`, the process exits with 1.

    Start this when the server begins to serve: importing torch and loading a model may hold the lock for long.
    """
    try:
        while True:
            faulthandler.dump_traceback_later(stuck_s, exit=True, file=_STDERR)
            await asyncio.sleep(stuck_s / 10)
    finally:
        faulthandler.cancel_dump_traceback_later()
