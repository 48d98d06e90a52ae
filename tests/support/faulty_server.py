"""The real server, started by its `__main__`, with a model that fails in the way that the prompt selects.

    python -m tests.support.faulty_server --model_dir ...

The double replaces `Runner.forward`. A step with more than `MAX_ROWS` rows runs out of memory.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Sequence

import torch

from model_server.__main__ import main
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.runner import Runner

MAX_ROWS = 4

POISON, KILL, HANG, KEEP_GIL = "\x01", "\x02", "\x03", "\x04"
"""Characters in a prompt that select a failure: control characters, whose tokens are bytes and no other prompt has."""
_FIRST_BYTE = 3
"""The token id of byte 0 in the tokenizer of the `model_dir` fixture."""


def break_model() -> None:
    forward = Runner.forward

    def faulty(
        self: Runner, decode: Sequence[TokenRange], prefill: Sequence[TokenRange], wanted: Sequence[int]
    ) -> torch.Tensor:
        read = {token_id - _FIRST_BYTE for segment in prefill for token_id in segment.token_ids}
        if ord(POISON) in read:
            raise ValueError("poison")
        if ord(KILL) in read:
            raise SystemExit("killed")
        if ord(HANG) in read:
            threading.Event().wait()
        if ord(KEEP_GIL) in read:
            ctypes.PyDLL(None).pause()  # unlike CDLL, PyDLL holds the GIL during the call
        if len(decode) + len(prefill) > MAX_ROWS:
            raise torch.OutOfMemoryError("no memory for another row")
        return forward(self, decode, prefill, wanted)

    Runner.forward = faulty  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    break_model()
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
