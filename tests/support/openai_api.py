"""OpenAI's API around an engine, with routes of a few lines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import openai
import orjson
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from model_server.api.openai.requests import models, parse_chat, parse_completion
from model_server.api.openai.responses import answer, sse
from model_server.api.prompts import ModelLimits, ServedModel
from model_server.engine.engine import Engine
from model_server.errors import ServeError
from tests.support.small_tokenizers import byte_fallback

NAME = "mistral-7b"
TEXT = byte_fallback()
VOCAB_SIZE = len(TEXT.tokenizer)
SERVER = ServedModel(NAME, TEXT, ModelLimits(max_model_len=64, vocab_size=VOCAB_SIZE, eos_token_ids=(2,)))
MESSAGES = [{"role": "user", "content": "hello"}]
Ask = Callable[[Callable[[openai.AsyncOpenAI], Awaitable[Any]]], Any]


def app_around(engine: Engine) -> Starlette:
    def generating(parse: Callable[..., Any]) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def route(http: HttpRequest) -> Response:
            try:
                call = parse(orjson.loads(await http.body()), SERVER)
                engine.submit(list(call.requests))
                if call.stream:
                    return StreamingResponse(await sse(call), media_type="text/event-stream")
                return JSONResponse(await answer(call))
            except ServeError as error:
                return JSONResponse(error.openai_body(), error.status)

        return route

    async def listing(http: HttpRequest) -> Response:
        return JSONResponse(models(SERVER, created_s=1))

    return Starlette(
        routes=[
            Route("/openai/v1/completions", generating(parse_completion), methods=["POST"]),
            Route("/openai/v1/chat/completions", generating(parse_chat), methods=["POST"]),
            Route("/openai/v1/models", listing),
        ]
    )
