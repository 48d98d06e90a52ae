"""The routes of OpenAI's API, beside KServe's, on the same engine.

On the paths that KServe gives them. Leaves out the wire format (`requests.py`, `responses.py`) and how errors look
(`middleware.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from model_server.api.http.streaming import EVENT_STREAM, Stream, cancel_on_disconnect
from model_server.api.interface import Model
from model_server.api.openai import requests as openai_requests
from model_server.api.openai import response_output
from model_server.api.openai.response_input import parse_response
from model_server.api.openai.responses import answer, sse
from model_server.api.openapi import openai_body
from model_server.api.v1.predict import parse_json

Parse = Callable[..., openai_requests.OpenAICall]


def openai_router(model: Model) -> APIRouter:
    """Return the routes, to be included in the app."""
    router = APIRouter(prefix="/openai/v1", tags=["OpenAI"])

    async def generate(request: Request, parse: Parse) -> Response:
        payload = parse_json(await request.body())
        request_id = request.headers.get("x-request-id", "")

        async def answered() -> Any:
            call = await model.submit(lambda deadline_s: parse(payload, model.served, request_id, deadline_s))
            return await (sse(call) if call.stream else answer(call))

        result = await cancel_on_disconnect(request, answered())
        return JSONResponse(result) if isinstance(result, dict) else Stream(result, media_type=EVENT_STREAM)

    @router.post("/completions", name="openai_completions", response_model=None, **openai_body("CompletionBody"))
    async def completions(request: Request) -> Response:
        """Complete a prompt."""
        return await generate(request, openai_requests.parse_completion)

    @router.post("/chat/completions", name="openai_chat_completions", response_model=None, **openai_body("ChatBody"))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await generate(request, openai_requests.parse_chat)

    @router.post("/responses", name="openai_responses", response_model=None, **openai_body("ResponseBody"))
    async def responses(request: Request) -> Response:
        """Answer a conversation, in the form of OpenAI's Responses API; nothing is kept."""
        payload = parse_json(await request.body())
        request_id = request.headers.get("x-request-id", "")

        async def answered() -> Any:
            call = await model.submit(lambda deadline_s: parse_response(payload, model.served, request_id, deadline_s))
            return await (response_output.sse(call) if call.stream else response_output.answer(call))

        result = await cancel_on_disconnect(request, answered())
        return JSONResponse(result) if isinstance(result, dict) else Stream(result, media_type=EVENT_STREAM)

    @router.get("/models", name="openai_models")
    async def models() -> dict[str, Any]:
        """List the one model."""
        return openai_requests.models(model.served, model.created_s)

    return router
