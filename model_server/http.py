"""What wraps every route: request ids, counting, errors, the size of bodies; and a client that leaves.

Plain ASGI layers, composed in one place (`wrap`). Owns how an error looks on the wire: the one handler that
turns the tree of `errors.py` into JSON, or into one event where a stream has begun. Leaves out the routes
(`routes.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import metrics
from .errors import BodyTooLarge, InternalError, ServeError, Unauthorized

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What we take from a caller: short, and harmless in a log or a header."""
EVENT_STREAM = "text/event-stream"

T = TypeVar("T")


def wrap(app: Starlette, *, max_request_bytes: int) -> None:
    """Put the layers around the routes, innermost first: a request passes them from the last to the first."""
    app.add_middleware(BodyLimit, max_request_bytes=max_request_bytes)
    app.add_middleware(Errors)
    app.add_middleware(Counted)
    app.add_middleware(RequestIds)


class RequestIds:
    """Gives each request an id, the caller's or a new one, in the request's headers and in the answer's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
            MutableHeaders(scope=scope)["x-request-id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class Counted:
    """Counts every POST: the rest is probes and lists. The label is a route's name, never a caller's path."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        began_s = time.monotonic()
        complete = False

        async def watched_send(message: Message) -> None:
            nonlocal complete
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, watched_send)
        finally:
            outcome = _state(scope).get("outcome") or ("ok" if complete else "cancelled")
            route = getattr(scope.get("route"), "name", "none")
            metrics.answered(route, outcome, time.monotonic() - began_s)


class Errors:
    """Answers whatever a route raises: as JSON, or as one last event where a stream has begun.

    Bare text has no place for an error: there the connection breaks, which every client notices.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        content_type: str | None = None

        async def watched_send(message: Message) -> None:
            nonlocal content_type
            if message["type"] == "http.response.start":
                content_type = Headers(raw=message["headers"]).get("content-type", "")
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
            return
        except ClientDisconnect:
            _state(scope)["outcome"] = "cancelled"
            return
        except ServeError as raised:
            error = raised
        except Exception as raised:
            error = InternalError()
            error.__cause__ = raised
        if content_type is None:
            await error_response(error, scope)(scope, receive, send)
            return
        _note(error, scope)
        if content_type.startswith(EVENT_STREAM):
            await send({"type": "http.response.body", "body": error_event(error).encode(), "more_body": False})


class BodyLimit:
    """Refuses a body that says it is too large, and one that turns out to be."""

    def __init__(self, app: ASGIApp, max_request_bytes: int) -> None:
        self.app = app
        self.max_request_bytes = max_request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._check(int(Headers(scope=scope).get("content-length", 0)))
        received_bytes = 0

        async def counted_receive() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            self._check(received_bytes)
            return message

        await self.app(scope, counted_receive, send)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self.max_request_bytes:
            raise BodyTooLarge(f"The body must be at most {self.max_request_bytes} bytes.")


def error_response(error: ServeError, scope: Scope, headers: dict[str, str] | None = None) -> Response:
    """Return an error as the answer to a request, and see that it is logged and counted."""
    _note(error, scope)
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(_dumps(error), error.status, headers, media_type="application/json")


def error_event(error: ServeError) -> str:
    """Return an error as the last event of a stream."""
    return f"event: error\ndata: {_dumps(error)}\n\n"


def _dumps(error: ServeError) -> str:
    # ASCII, because the sentence may quote half a surrogate pair, which JSON can say and UTF-8 cannot.
    return json.dumps(error.body(), ensure_ascii=True)


def _note(error: ServeError, scope: Scope) -> None:
    """Log and count an error. The sentence stays out of the log: it may quote the request."""
    _state(scope)["outcome"] = error.code
    level = logging.ERROR if error.status == 500 else logging.INFO
    request_id = Headers(scope=scope).get("x-request-id", "")
    field = f" (field {error.field!r})" if error.field else ""
    log.log(
        level,
        "%s answered %d %s%s",
        request_id,
        error.status,
        error.code,
        field,
        exc_info=error.__cause__ if error.status == 500 else None,
        extra={"request_id": request_id, "outcome": error.code},
    )


def _state(scope: Scope) -> dict[str, Any]:
    return scope.setdefault("state", {})


class Stream(StreamingResponse):
    """A body made while it is sent, by a generator that is closed however the response ends.

    A client that stops reading is given up after `client_stall_s`, with all that waits for it.
    """

    def __init__(self, chunks: AsyncGenerator[str, None], *, media_type: str, client_stall_s: float) -> None:
        super().__init__(
            chunks, media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._chunks = chunks
        self._client_stall_s = client_stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def patient_send(message: Message) -> None:
            try:
                async with asyncio.timeout(self._client_stall_s):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        async with contextlib.aclosing(self._chunks):
            await super().__call__(scope, receive, patient_send)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await the work for a request whose body has been read; cancel it when the client goes away.

    Raises:
        ClientDisconnect: it did.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
