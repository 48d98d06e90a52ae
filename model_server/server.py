"""KServe's `ModelServer` with this server's app and a drain.

At the first SIGTERM or SIGINT the server refuses new requests with 503 and `Retry-After`, finishes the running ones and
exits. A second signal ends it at once. KServe would close the port first, and clients would see a refused connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import uvloop
from kserve.model_server import ModelServer
from starlette.types import ASGIApp

from model_server.api.http.connection import Connection
from model_server.settings import Settings
from model_server.telemetry import startup, watchdog

if TYPE_CHECKING:
    from model_server.model import MistralModel

log = logging.getLogger(__name__)

FLUSH_SECONDS = 5
"""Time for slow clients to read their last bytes after the drain."""


class Server(ModelServer):
    """Serves one model until a signal ends the process."""

    def __init__(self, model: MistralModel, app: ASGIApp, settings: Settings) -> None:
        kserve = settings.kserve
        super().__init__(
            http_port=settings.http_port,
            max_asyncio_workers=kserve.max_asyncio_workers,
            enable_grpc=False,
            timeout_keep_alive=kserve.timeout_keep_alive,
            event_loop=kserve.event_loop,
            ssl_certfile=kserve.ssl_certfile,
            ssl_keyfile=kserve.ssl_keyfile,
            grace_period=FLUSH_SECONDS,
        )
        self._model = model
        self._app = app
        self._connection = partial(Connection, client_stall_s=settings.client_stall_seconds)
        self._drain_seconds = settings.drain_seconds
        self._watchdog_seconds = settings.watchdog_seconds
        self._draining: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Serve; return once drained."""
        self.start([self._model])

    def setup_event_loop(self) -> None:
        """Choose the event loop: KServe accepts the flag but always runs asyncio's own.

        KServe calls `asyncio.run` itself, and `uvloop.install` is deprecated from Python 3.12 on.
        """
        if self.event_loop != "asyncio":
            asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

    def register_signal_handler(self) -> None:
        """Configure the HTTP server that KServe has made and not yet started."""
        self._uvicorn = self._rest_server._server
        self._uvicorn.handle_exit = self._handle_exit
        config = self._uvicorn.config
        config.app = self._app
        config.http = self._connection
        config.ws = "none"
        config.callback_notify = self._announce

    async def _announce(self) -> None:
        """Arm the watchdog and log the URL once the port is open."""
        self._uvicorn.config.callback_notify = None
        if self._watchdog_seconds:  # the end of the event loop cancels the task
            self._watchdog = asyncio.create_task(watchdog.watch(self._watchdog_seconds))
        startup.phase_ended("listen")
        scheme = "https" if self._uvicorn.config.is_ssl else "http"
        log.info("ready: POST %s://localhost:%d/v1/models/%s:predict", scheme, self.http_port, self._model.name)

    def _handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None:
            os._exit(128 + sig)
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        log.info("draining: running requests have up to %g s", self._drain_seconds)
        try:
            await self._model.drain(self._drain_seconds)
        finally:
            self._uvicorn.should_exit = True
