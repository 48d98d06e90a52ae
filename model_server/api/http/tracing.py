"""The middleware that traces every POST; `telemetry/traces.py` has the spans."""

from __future__ import annotations

from dataclasses import replace

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_server.caller import caller
from model_server.telemetry.traces import Tracer


class TraceMiddleware:
    """Traces every POST from its arrival to the end of its answer, whose headers have the trace's id."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self.app = app
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        trace = self.tracer.begin(Headers(scope=scope))
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-trace-id"] = trace.trace_id
            await send(message)

        token = caller.set(replace(caller.get(), trace=trace))
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            caller.reset(token)
            route = getattr(scope.get("route"), "path", None)
            trace.finish(scope["method"], route, status, scope.get("state", {}).get("outcome"))
