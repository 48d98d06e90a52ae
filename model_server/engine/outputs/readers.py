"""Wakes the readers of requests, coroutines in the event loop, from the engine's threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from model_server.request import Channel, Request


class Readers:
    """Calls into the event loop from other threads."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self) -> None:
        """Store the running event loop; call it in the loop."""
        self._loop = asyncio.get_running_loop()

    def wake(self, requests: Iterable[Request]) -> None:
        """Wake the readers of these requests with one call into the event loop."""
        channels = [request.channel for request in requests]
        if channels:
            self.call(_wake_all, channels)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function in the event loop; do nothing if no loop is attached or the loop is closed."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _wake_all(channels: Iterable[Channel]) -> None:
    for channel in channels:
        channel.wake()
