"""A connection of ours: uvicorn's, except that nobody holds one for nothing.

Uvicorn waits for ever for a request that is begun and not finished, and for a client that stops reading. Here
it is given up when nothing moves for `client_stall_s` while it is the client's turn: to finish the head of a
request, to finish a body that was refused, or to take what was written. The body of a request that is being
answered is `http.py`'s matter, which can still say 408. h11 bounds what an unfinished head may hold.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from model_server.errors import BadRequest


class Connection(H11Protocol):
    """One connection, watched while it is the client's turn."""

    def __init__(self, *args: Any, client_stall_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._client_stall_s = client_stall_s
        self._watch: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        """How much was written and not yet taken when the watch began."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._keep_watch()

    def data_received(self, data: bytes) -> None:
        if self.timeout_keep_alive_task is not None:
            self._end_watch()  # a new request begins, with a time of its own
        super().data_received(data)
        self._keep_watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._keep_watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._keep_watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._keep_watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_watch()

    def send_400_response(self, msg: str) -> None:
        """Say in our own shape that this is not HTTP, if the answer has not begun."""
        self._tell_gone()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        error = BadRequest("This is not HTTP as it should be, or its head is too large.")
        headers = [("Content-Type", "application/json"), ("Connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=json.dumps(error.body()).encode()),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._keep_watch()

    def _keep_watch(self) -> None:
        answered = self.cycle is None or self.cycle.response_complete
        if not answered and not self.flow.write_paused:
            self._end_watch()
        elif self._watch is None:
            self._unread_bytes = self.transport.get_write_buffer_size()
            self._watch = self.loop.call_later(self._client_stall_s, self._look)

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _look(self) -> None:
        self._watch = None
        unread_bytes = self.transport.get_write_buffer_size()
        if 0 < unread_bytes < self._unread_bytes:
            self._keep_watch()  # slow, but reading
        elif unread_bytes or self.timeout_keep_alive_task is None:
            self._tell_gone()
            self.transport.abort()
        # Else it is idle between two requests, where uvicorn's own timer runs.

    def _tell_gone(self) -> None:
        """Have a request under way end as if its client had left: what it still sends goes nowhere.

        Before its connection ends: a stream that can write again would run through all it has left, unread, and
        count as answered.
        """
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
