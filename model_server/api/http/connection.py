"""An HTTP connection: uvicorn's, with a time limit on stalled clients.

Uvicorn has no time limit for an unfinished request or for a client that stops reading. This class closes the
connection when no byte moves for `client_stall_s` while the server waits for the client: to finish a request's head,
to finish a refused body, or to read a response. The time limit of a request's body is in
`middleware.py`, which can still answer 408. h11 bounds the size of an unfinished head.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from model_server.errors import BadRequest


class Connection(H11Protocol):
    """One connection, timed while the server waits for the client."""

    def __init__(self, *args: Any, client_stall_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._client_stall_s = client_stall_s
        self._timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        """Bytes written and not yet read by the client when the timer started."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        if self.timeout_keep_alive_task is not None:
            self._stop_timer()  # a new request begins, with a new time limit
        super().data_received(data)
        self._start_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._start_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with this server's error format, if the response has not begun."""
        self._disconnect()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        error = BadRequest("Malformed HTTP request, or request head too large.")
        headers = [("Content-Type", "application/json"), ("Connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=json.dumps(error.body()).encode()),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._start_timer()

    def _start_timer(self) -> None:
        answered = self.cycle is None or self.cycle.response_complete
        if not answered and not self.flow.write_paused:
            self._stop_timer()
        elif self._timer is None:
            self._unread_bytes = self.transport.get_write_buffer_size()
            self._timer = self.loop.call_later(self._client_stall_s, self._check_progress)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_progress(self) -> None:
        self._timer = None
        unread_bytes = self.transport.get_write_buffer_size()
        if 0 < unread_bytes < self._unread_bytes:
            self._start_timer()  # slow, but reading
        elif unread_bytes or self.timeout_keep_alive_task is None:
            self._disconnect()
            self.transport.abort()
        # Else it is idle between two requests, where uvicorn's own timer runs.

    def _disconnect(self) -> None:
        """End a running request as if its client had disconnected; drop the bytes that it still sends.

        Called before the connection is closed: otherwise a stream could write again, run to its end unread, and
        count as answered.
        """
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
