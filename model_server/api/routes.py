"""The routes of KServe's V1 protocol, health and metrics, on an app of our own.

KServe's own app is not served. Its predict route sends no content type for a stream, does not notice a disconnect
and puts internals into errors, and it has routes that unload the model without a key. Only the routes of this module
exist. Leaves out the middleware, the wire format (`v1/`) and the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NotRequired

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import REGISTRY, exposition
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from model_server import __version__
from model_server.api import openapi
from model_server.api.http.middleware import error_response
from model_server.api.http.streaming import EVENT_STREAM, Stream, cancel_on_disconnect
from model_server.api.interface import Model
from model_server.api.v1.predict import parse_json
from model_server.errors import EngineDead, MethodNotAllowed, NotReady, ServeError, UnknownModel, UnknownRoute


class Live(TypedDict):
    status: Literal["alive"]
    live: Literal[True]


class Ready(TypedDict):
    ready: Literal[True]
    degraded: NotRequired[list[str]]
    """GPU features that do not work (flash_attention, cuda_graphs); absent if all work."""


class ModelReady(Ready):
    name: str


class Models(TypedDict):
    models: list[str]


class _NameConvertor(StringConvertor):
    regex = "[^/:]+"  # without the colon, so that `GET .../name:predict` is a wrong method, not a strange name


register_url_convertor("name", _NameConvertor())


TRUSS_READY_PATHS = ("/v1/models/model", "/v1/models/model/loaded")
"""Where a Truss's container says whether it is ready, under the name that every model has there."""


def accepts_plain_text(headers: Mapping[str, str]) -> bool:
    """Return whether the client wants the stream as plain text instead of events."""
    return any(part.split(";")[0].strip() == "text/plain" for part in headers.get("accept", "").split(","))


def public_paths(model_name: str) -> frozenset[str]:
    """Return the paths of health checks and metrics, which need no key."""
    of_model = {f"/v1/models/{model_name}", f"/v2/models/{model_name}/ready"}
    return frozenset({"/", "/v2/health/live", "/v2/health/ready", "/metrics", *TRUSS_READY_PATHS} | of_model)


def create_app(model: Model, *, docs: bool = False) -> FastAPI:
    """Return the app with its routes; more may be added to it."""
    app = FastAPI(
        title=f"{model.name} on KServe",
        version=__version__,
        docs_url="/docs" if docs else None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(HTTPException, _refuse_route)

    @app.get("/", name="root")
    @app.get("/v2/health/live", name="live")
    async def live() -> Live:
        """Return 200 until the engine has died."""
        if model.dead is not None:
            raise EngineDead("The generation thread has died; the server must be restarted.")
        return {"status": "alive", "live": True}

    @app.get("/v2/health/ready", name="ready")
    async def ready() -> Ready:
        """Return 200 while new requests are accepted."""
        if not await model.healthy():
            raise NotReady(f"{model.name} accepts no new requests at the moment.")
        return {"ready": True, "degraded": model.degraded} if model.degraded else {"ready": True}

    for path in TRUSS_READY_PATHS:
        if path != f"/v1/models/{model.name}":
            app.get(path, name="truss_ready")(ready)

    @app.get("/v1/models", name="models")
    async def models() -> Models:
        """List the one model."""
        return {"models": [model.name]}

    @app.get("/v1/models/{model_name:name}", name="model")
    @app.get("/v2/models/{model_name:name}/ready", name="model_ready")
    async def model_ready(model_name: str) -> ModelReady:
        """Return 200 while the model accepts new requests."""
        _check_name(model_name)
        return {"name": model_name, **await ready()}

    @app.post("/v1/models/{model_name:name}:predict", name="predict", response_model=None, **openapi.PREDICT)
    async def predict(model_name: str, request: Request) -> Response:
        """Generate."""
        _check_name(model_name)
        payload = parse_json(await request.body())
        answer = await cancel_on_disconnect(request, model.predict(payload, request.headers))
        if isinstance(answer, dict):
            return JSONResponse(answer)
        media_type = "text/plain" if accepts_plain_text(request.headers) else EVENT_STREAM
        return Stream(answer, media_type=media_type)

    @app.get("/metrics", name="metrics", response_model=None, **openapi.METRICS)
    async def metrics(request: Request) -> Response:
        """Return the metrics in the format that the scraper accepts."""
        encode, content_type = exposition.choose_encoder(request.headers.get("accept", ""))
        return Response(encode(REGISTRY), headers={"Content-Type": content_type})

    def _check_name(model_name: str) -> None:
        if model_name != model.name:
            raise UnknownModel(f"There is no model {model_name!r} here; this server serves {model.name}.")

    return app


async def _refuse_route(request: Request, error: Exception) -> Response:
    """Answer the router's errors with this server's error format."""
    assert isinstance(error, HTTPException)
    refusal: ServeError
    if error.status_code == 405:
        refusal = MethodNotAllowed(f"{request.method} is not allowed here.")
    else:
        refusal = UnknownRoute("There is no such route; POST /v1/models/{name}:predict generates.")
    return error_response(refusal, request.scope, dict(error.headers or {}))
