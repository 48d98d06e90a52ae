"""A model that plays a script behind the real routes, and httpx clients in the process or over a socket."""

import asyncio
import socket
from collections.abc import AsyncIterator
from functools import partial

import httpx
import uvicorn
import uvloop

from model_server.api.http.connection import Connection
from model_server.api.http.middleware import wrap
from model_server.api.routes import create_app
from model_server.api.truss import truss_router

PREDICT = "/v1/models/tiny:predict"


class ScriptedModel:
    """Answers with its script; records whether its client disconnected."""

    name = "tiny"

    def __init__(self) -> None:
        self.dead: str | None = None
        self.accepting = True
        self.degraded: list[str] = []
        self.headers: dict[str, str] = {}
        self.error: Exception | None = None
        self.chunks: list[bytes | Exception] = []
        self.hang = False
        self.called = asyncio.Event()
        self.left = asyncio.Event()

    async def healthy(self) -> bool:
        return self.accepting

    async def predict(self, payload, headers):
        self.headers = dict(headers)
        self.called.set()
        if self.error is not None:
            raise self.error
        if payload.get("stream"):
            return self._stream()
        if self.hang:
            await self._until_left()
        return {"predictions": [payload]}

    async def _stream(self) -> AsyncIterator[bytes]:
        try:
            for chunk in self.chunks:
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
            if self.hang:
                await self._until_left()
        finally:
            self.left.set()

    async def _until_left(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()


def make_app(model: ScriptedModel, *, docs: bool = False):
    app = create_app(model, docs=docs)
    app.include_router(truss_router(model))
    wrap(app, max_request_bytes=1000, client_stall_s=30)
    return app


def ask(model: ScriptedModel, method: str, path: str, *, docs: bool = False, **request) -> httpx.Response:
    """Send one request to the app, without a network."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(model, docs=docs))
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            return await client.request(method, path, **request)

    return asyncio.run(run())


def over_a_socket(model: ScriptedModel, act, client_stall_s: float = 30):
    """Run `act(client)` against a server on a free port, in the server's event loop."""

    async def run():
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(model),
                http=partial(Connection, client_stall_s=client_stall_s),  # type: ignore[arg-type]
                log_config=None,
                lifespan="off",
            )
        )
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            host, port = listener.getsockname()
            serving = asyncio.create_task(server._serve([listener]))
            try:
                async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=10) as client:
                    return await act(client)
            finally:
                server.should_exit = True
                await serving

    return uvloop.run(run())
