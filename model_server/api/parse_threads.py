"""Threads that parse request bodies, because tokenizing a long prompt in the event loop would stall all streams.

A body with a grammar that is not compiled yet goes to threads of its own: a compilation takes up to a second, and other
bodies must not wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from model_server.errors import QueueFull
from model_server.text.grammar import NotCompiled, only_compiled

T = TypeVar("T")

MAX_COMPILATIONS = 2
"""Number of bodies with a new grammar that are parsed at once: while one compiles long, another goes on."""


class ParseThreads:
    """Parses bodies; at most `max_waiting` bodies with a new grammar wait for their compilation."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._num_compiling = 0
        """Number of bodies with a new grammar, those that wait included."""
        self._compiling = ThreadPoolExecutor(MAX_COMPILATIONS, thread_name_prefix="compile-grammar")

    async def run(self, parse: Callable[[], T]) -> T:
        """Return the result of `parse`, which may be called twice.

        Raises:
            QueueFull: too many bodies with a new grammar are waiting.
        """
        try:
            with only_compiled():
                return await asyncio.to_thread(parse)
        except NotCompiled:
            return await self._compile(parse)

    async def _compile(self, parse: Callable[[], T]) -> T:
        if self._num_compiling >= self._max_waiting + MAX_COMPILATIONS:
            raise QueueFull(
                f"{self._max_waiting} requests are waiting for the compilation of their grammar, and no more may.",
                retry_after_s=1,
            )
        self._num_compiling += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compiling, parse)
        finally:
            self._num_compiling -= 1
