"""The middleware of every route: CORS, request ids, metrics, errors, API keys, limits.

Plain ASGI middleware, composed in one place (`wrap`). One of them turns the tree of `errors.py` into JSON, or into one
event where a stream has begun. The keys are in `auth.py`, connections in `connection.py`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_server.api.http.auth import CHALLENGE, ApiKeyMiddleware, ApiKeys
from model_server.api.http.streaming import EVENT_STREAM
from model_server.api.http.tracing import TraceMiddleware
from model_server.caller import caller
from model_server.errors import (
    BadRequest,
    BodyTooLarge,
    HeadersTooLarge,
    InternalError,
    ServeError,
    TooSlow,
    Unauthorized,
)
from model_server.telemetry import metrics
from model_server.telemetry.traces import Tracer

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""A request id that is accepted from a client: short, and harmless in a log or a header."""
FIELD = re.compile(r"[a-z0-9_.\[\]]{1,64}")
"""A field's name that the log may show. The client chose it: any other may be a piece of a prompt."""
OPENAI_ROOT = "/openai/"
"""Paths below it are OpenAI's API, errors included."""
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
LEAST_BYTES_PER_S = 8 * 1024
"""A body gets one second more for each of these bytes received; every usable connection is faster."""


def wrap(
    app: Starlette,
    *,
    max_request_bytes: int,
    client_stall_s: float,
    keys: ApiKeys | None = None,
    max_requests_per_key: int = 0,
    free: frozenset[str] = frozenset(),
    pages: Mapping[str, Response] | None = None,
    cors_origins: Sequence[str] = (),
    tracer: Tracer | None = None,
) -> None:
    """Add the middleware, innermost first: a request passes them from the last to the first."""
    app.add_middleware(LimitsMiddleware, max_request_bytes=max_request_bytes, client_stall_s=client_stall_s)
    if keys is not None:
        app.add_middleware(
            ApiKeyMiddleware, keys=keys, free=free, pages=pages or {}, max_requests_per_key=max_requests_per_key
        )
    app.add_middleware(ErrorMiddleware)
    app.add_middleware(MetricsMiddleware)
    if tracer is not None:
        app.add_middleware(TraceMiddleware, tracer=tracer)
    app.add_middleware(RequestIdMiddleware)
    if cors_origins:
        # Outermost, because a browser's preflight request has no key, and the page must be able to read errors.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "X-Trace-Id", "Retry-After"),
        )


class RequestIdMiddleware:
    """Gives each request an id, the caller's or a new one, in the request's headers and in the answer's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = f"{random.getrandbits(128):032x}"  # `uuid4` asks the kernel, and loses the interpreter's lock
            MutableHeaders(scope=scope)["x-request-id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class MetricsMiddleware:
    """Counts every POST; other methods are probes and lists. The label is a route's name, never a client's path."""

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


class ErrorMiddleware:
    """Answers an exception of a route: as JSON, or as the last event of a stream that has begun.

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
            await send({"type": "http.response.body", "body": error_event(error, scope).encode(), "more_body": False})


class LimitsMiddleware:
    """Refuses too many headers, a body that is too large, and a body that arrives too slowly.

    A body has `client_stall_s` to arrive, and a second more for every 8 KiB of it: slower ones get 408.
    """

    def __init__(self, app: ASGIApp, max_request_bytes: int, client_stall_s: float) -> None:
        self.app = app
        self.max_request_bytes = max_request_bytes
        self.client_stall_s = client_stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
            raise HeadersTooLarge(f"A request may have {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes in all.")
        if "content-length" in headers and "transfer-encoding" in headers:
            raise BadRequest("A request must not have both Content-Length and Transfer-Encoding.")
        self._check_size(int(headers.get("content-length", 0)))
        deadline_s = asyncio.get_running_loop().time() + self.client_stall_s
        received_bytes = 0
        complete = False

        async def limited_receive() -> Message:
            nonlocal received_bytes, complete
            if complete:  # the next message is the client's disconnect, which has no time limit
                return await receive()
            try:
                async with asyncio.timeout_at(deadline_s + received_bytes / LEAST_BYTES_PER_S):
                    message = await receive()
            except TimeoutError:
                raise TooSlow(f"The body arrived too slowly: {received_bytes} bytes arrived in time.") from None
            received_bytes += len(message.get("body", b""))
            self._check_size(received_bytes)
            complete = not message.get("more_body", False)
            return message

        await self.app(scope, limited_receive, send)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self.max_request_bytes:
            raise BodyTooLarge(f"The body must be at most {self.max_request_bytes} bytes.")


def error_response(error: ServeError, scope: Scope, headers: dict[str, str] | None = None) -> Response:
    """Return an error as the response to a request; log and count it."""
    _note(error, scope)
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = CHALLENGE
    if isinstance(error, TooSlow):
        headers["Connection"] = "close"  # the server does not wait for the rest of the body
    return Response(_dumps(error, scope), error.status, headers, media_type="application/json")


def error_event(error: ServeError, scope: Scope) -> str:
    """Return an error as the last event of a stream."""
    return f"event: error\ndata: {_dumps(error, scope)}\n\n"


def _dumps(error: ServeError, scope: Scope) -> str:
    """Return an error as JSON, in the shape of the API that was called."""
    body = error.openai_body() if scope["path"].startswith(OPENAI_ROOT) else error.body()
    # ASCII, because the sentence may quote half a surrogate pair, which UTF-8 cannot encode.
    return json.dumps(body, ensure_ascii=True)


def _note(error: ServeError, scope: Scope) -> None:
    """Log and count an error. The sentence stays out of the log: it may quote the request."""
    _state(scope)["outcome"] = error.code
    level = logging.ERROR if error.status == 500 else logging.INFO
    request_id = Headers(scope=scope).get("x-request-id", "")
    trace = caller.get().trace
    field = f" (field {error.field!r})" if error.field and FIELD.fullmatch(error.field) else ""
    log.log(
        level,
        "%s answered %d %s%s%s",
        request_id,
        error.status,
        error.code,
        field,
        f" (trace {trace.trace_id})" if trace else "",
        exc_info=error.__cause__ if error.status == 500 else None,
        extra={"request_id": request_id, "outcome": error.code} | ({"trace_id": trace.trace_id} if trace else {}),
    )


def _state(scope: Scope) -> dict[str, Any]:
    return scope.setdefault("state", {})
