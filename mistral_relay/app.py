"""The relay's routes: `POST .../async_predict`, `GET` and `DELETE /async_request/{id}`, health and metrics."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio
import httpx
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mistral_relay import webhooks
from mistral_relay.record import Status
from mistral_relay.settings import Settings
from mistral_relay.store import KeyReused, QueueFull, Store
from mistral_relay.worker import Worker
from model_server.api.http.auth import CHALLENGE, SCHEMES, ApiKeys

log = logging.getLogger(__name__)

PREFIXES = ("", "/production", "/development", "/environments/{name}", "/deployment/{id}")


class RetryConfig(BaseModel):
    """How often and how fast a failed call is repeated."""

    model_config = ConfigDict(extra="forbid")
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    initial_delay_ms: Annotated[int, Field(ge=0, le=10_000)] = 1000
    max_delay_ms: Annotated[int, Field(ge=0, le=60_000)] = 5000


class AsyncPredict(BaseModel):
    """The body of `async_predict`, with the hosted service's names and limits."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model_input: dict[str, Any]
    webhook_endpoint: str | None = None
    priority: Annotated[int, Field(ge=0, le=2)] = 0
    """Lower goes first."""
    max_time_in_queue_seconds: Annotated[int, Field(ge=10, le=259_200)] = 600
    inference_retry_config: RetryConfig = RetryConfig()


def create_app(settings: Settings, *, transport: httpx.AsyncBaseTransport | None = None) -> Starlette:
    """Return the relay as an ASGI app that works while its lifespan runs.

    `transport` stands in for the network of webhooks in tests.
    """
    keys = ApiKeys(settings.api_key_file) if settings.api_key_file else None

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        store = Store(settings.database, max_queue_size=settings.max_queue_size)
        headers = {}
        if settings.upstream_key_file is not None:
            headers["Authorization"] = f"Api-Key {settings.upstream_key_file.read_text().split()[0]}"
        pool = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(headers=headers, limits=pool) as http,
            httpx.AsyncClient(transport=transport) as out,
        ):
            sender = None
            if settings.webhook_secret_file is not None:
                sender = webhooks.Sender(out, settings.webhook_secret_file.read_text().strip())
            app.state.store = store
            app.state.worker = Worker(
                store, http, sender, upstream_url=settings.upstream_url, concurrency=settings.concurrency,
                timeout_s=settings.upstream_timeout_s, retention_s=settings.retention_s,
            )  # fmt: skip
            async with anyio.create_task_group() as group:
                group.start_soon(app.state.worker.run)
                yield
                group.cancel_scope.cancel()
        store.close()

    def guarded(handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def check(request: Request) -> Response:
            if keys is not None and not _has_key(request, keys):
                refusal = _refusal(401, "unauthorized", "A key is needed: send the header Authorization: Api-Key KEY.")
                refusal.headers["WWW-Authenticate"] = CHALLENGE
                return refusal
            try:
                return await handle(request)
            except sqlite3.Error as error:
                log.error("the database cannot be used: %s", error)
                return _refusal(503, "unavailable", "The relay cannot store the request now; send it again later.", 30)

        return check

    async def accept(request: Request) -> Response:
        body = await _body(request, settings.max_request_bytes)
        if body is None:
            return _refusal(413, "body_too_large", f"The body is larger than {settings.max_request_bytes} bytes.")
        try:
            asked = AsyncPredict.model_validate_json(body)
        except ValidationError as error:
            return _refusal(400, "bad_request", _sentence(error))
        if asked.model_input.get("stream"):
            return _refusal(
                400, "bad_request", "model_input.stream must be false: the relay delivers complete answers."
            )
        if asked.webhook_endpoint is not None:
            reason = webhooks.refusal(asked.webhook_endpoint, settings.webhook_hosts)
            if reason is not None:
                return _refusal(400, "bad_request", reason)
        try:
            request_id = await anyio.to_thread.run_sync(
                lambda: app.state.store.add(
                    request.url.path, asked.model_input, priority=asked.priority,
                    max_time_in_queue_s=asked.max_time_in_queue_seconds, webhook=asked.webhook_endpoint,
                    retry=asked.inference_retry_config.model_dump(),
                    idempotency_key=request.headers.get("idempotency-key"),
                )
            )  # fmt: skip
        except QueueFull:
            return _refusal(429, "queue_full", f"{settings.max_queue_size} requests wait already.", 30)
        except KeyReused:
            return _refusal(422, "idempotency_key_reused", "This Idempotency-Key was used for another request.")
        app.state.worker.wake()
        return JSONResponse({"request_id": request_id}, 201)

    async def show(request: Request) -> Response:
        record = await anyio.to_thread.run_sync(app.state.store.get, request.path_params["id"])
        if record is None:
            return _refusal(404, "not_found", "There is no such request, or its result has been deleted.")
        return JSONResponse(
            {
                "request_id": record.id, "status": record.status, "webhook_status": record.webhook_status,
                "created_at": record.created_at, "status_at": record.status_at, "errors": record.errors,
                **({"data": record.data} if record.status is Status.SUCCEEDED else {}),
            }
        )  # fmt: skip

    async def cancel(request: Request) -> Response:
        request_id = request.path_params["id"]
        if await anyio.to_thread.run_sync(app.state.store.get, request_id) is None:
            return _refusal(404, "not_found", "There is no such request, or its result has been deleted.")
        canceled = await anyio.to_thread.run_sync(app.state.store.cancel, request_id)
        message = "The request was canceled." if canceled else "Only a request that is QUEUED can be canceled."
        return JSONResponse({"request_id": request_id, "canceled": canceled, "message": message})

    async def health(request: Request) -> Response:
        await anyio.to_thread.run_sync(app.state.store.counts)
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        counts = await anyio.to_thread.run_sync(app.state.store.counts)
        return Response(generate_latest(_registry(counts)), media_type=CONTENT_TYPE_LATEST)

    app = Starlette(
        lifespan=lifespan,
        routes=[
            *(Route(f"{prefix}/async_predict", guarded(accept), methods=["POST"]) for prefix in PREFIXES),
            Route("/async_request/{id}", guarded(show), methods=["GET"]),
            Route("/async_request/{id}", guarded(cancel), methods=["DELETE"]),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
    )
    return app


async def _body(request: Request, limit: int) -> bytes | None:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                return None
    except ClientDisconnect:
        return b""
    return bytes(body)


def _has_key(request: Request, keys: ApiKeys) -> bool:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() in SCHEMES and keys.name_of(key.strip().encode()) is not None


def _refusal(status: int, code: str, sentence: str, retry_after_s: int | None = None) -> Response:
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return JSONResponse({"error": sentence, "code": code}, status, headers)


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}." if place else f"{first['msg']}."


def _registry(counts: dict[str, int]) -> CollectorRegistry:
    gauge = GaugeMetricFamily("mistral_relay_requests", "Requests in the store, by status.", labels=["status"])
    for status in Status:
        gauge.add_metric([status], counts.get(status, 0))
    registry = CollectorRegistry()
    registry.register(_Fixed([gauge]))
    return registry


class _Fixed:
    def __init__(self, families: list[GaugeMetricFamily]) -> None:
        self._families = families

    def collect(self) -> list[GaugeMetricFamily]:
        return self._families
