"""The server, composed by its own `__main__`, with the fault that FAULT names."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import time
from typing import Any

sys.path.insert(0, "/app")

import uvicorn.protocols.http.h11_impl as http

from model_server.__main__ import main
from model_server.compute.runner import Runner

forward, send = Runner.forward, http.RequestResponseCycle.send
steps = itertools.count()


def crash(self: Runner, *arguments: Any) -> Any:
    """Be ready, and end in the middle of an answer, again after each restart."""
    if next(steps) == 40:
        os._exit(1)
    return forward(self, *arguments)


def nonsense(self: Runner, *arguments: Any) -> Any:
    """Answer with the neighbour of each token."""
    return forward(self, *arguments).roll(1, dims=-1)


def slow(self: Runner, *arguments: Any) -> Any:
    """Take three times as long for each step."""
    began_s = time.monotonic()
    logits = forward(self, *arguments)
    time.sleep(2 * (time.monotonic() - began_s))
    return logits


def stuck(self: Runner, *arguments: Any) -> Any:
    """Be ready, and keep the interpreter's lock in a C call in the middle of an answer: no thread of Python runs."""
    if next(steps) == 40:
        ctypes.PyDLL(None).sleep(86_400)
    return forward(self, *arguments)


async def cut(self: http.RequestResponseCycle, message: Any) -> None:
    """Close the connection in the middle of each stream."""
    if message["type"] == "http.response.body" and message.get("more_body") and next(steps) % 8 == 7:
        self.transport.abort()
    await send(self, message)


def start(fault: str) -> None:
    if fault == "never-ready":
        time.sleep(86_400)
    elif fault == "cut-streams":
        http.RequestResponseCycle.send = cut  # type: ignore[method-assign]
    else:
        faults = {"crash": crash, "nonsense": nonsense, "slow": slow, "stuck": stuck}
        Runner.forward = faults[fault]  # type: ignore[method-assign]


if __name__ == "__main__":
    start(os.environ["FAULT"])
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
