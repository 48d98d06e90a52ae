"""The readers of requests: coroutines in the event loop that an engine thread wakes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from model_server.request import Channel, Request


class Readers:
    """Reaches the event loop from other threads."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self) -> None:
        """Note the running event loop; call it in the loop."""
        self._loop = asyncio.get_running_loop()

    def wake(self, requests: Iterable[Request]) -> None:
        """Wake the readers of these requests with one call into the event loop."""
        channels = [request.channel for request in requests]
        if channels:
            self.call(_wake_all, channels)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Have the event loop call a function, if there is one and it runs."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _wake_all(channels: Iterable[Channel]) -> None:
    for channel in channels:
        channel.wake()
