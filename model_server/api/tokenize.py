"""The routes `/tokenize` and `/detokenize`, with vLLM's bodies and answers.

They read the tokenizer alone: nothing is queued and nothing is generated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from model_server.api.interface import Model
from model_server.api.openai.requests import chat_messages, check_model
from model_server.api.openai.schema import ChatMessage, NotEmpty
from model_server.api.prompts import ServedModel, check_messages, encode_messages, encode_prompt
from model_server.api.tools.schema import ToolFields
from model_server.api.tools.use import tool_use
from model_server.api.v1.predict import parse_json
from model_server.api.validation import describe, validate
from model_server.errors import BadRequest

TOKENIZER_TAG = "Tokenizer"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class TokenizePrompt(_Strict):
    """The text of a completion."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = Field(True, description="whether the prompt begins with the tokenizer's special tokens")
    return_token_strs: bool = Field(False, description="whether the answer has the tokens as text, too")


class TokenizeMessages(_Strict, ToolFields):
    """The messages of a chat, with its tools; the model's chat template writes the special tokens."""

    model: str | None = None
    messages: NotEmpty[ChatMessage]
    add_generation_prompt: Literal[True] = True
    continue_final_message: Literal[False] = False
    add_special_tokens: Literal[False] = False
    return_token_strs: bool = Field(False, description="whether the answer has the tokens as text, too")


class Tokens(_Strict):
    """The tokens of a prompt."""

    count: int
    max_model_len: int = Field(description="tokens that prompt and answer may have together")
    tokens: list[int]
    token_strs: list[str] | None = Field(description="the tokens as the vocabulary writes them, or null")


class DetokenizeBody(_Strict):
    """Tokens to be written as text."""

    model: str | None = None
    tokens: list[int]


class Detokenized(_Strict):
    """The text of tokens, special ones included."""

    prompt: str


def tokenize(payload: object, model: ServedModel) -> Tokens:
    """Return the tokens of a prompt or of messages.

    Raises:
        ServeError: the sentence names the field.
    """
    body: TokenizePrompt | TokenizeMessages
    given = _given(payload, model)
    if "messages" in given:
        if "prompt" in given:
            raise BadRequest("prompt and messages exclude each other: send only one of them.", field="prompt")
        body = validate(TokenizeMessages, given)
        tools = tool_use(body, model)
        definitions = tools.definitions if tools else ()
        check_messages(body.messages, model, "messages")
        _, ids = encode_messages(chat_messages(body.messages), model, "messages", definitions)
    else:
        body = validate(TokenizePrompt, given)
        ids = encode_prompt(body.prompt, model, "prompt", add_special_tokens=body.add_special_tokens)
    return Tokens(
        count=len(ids),
        max_model_len=model.limits.max_model_len,
        tokens=ids,
        token_strs=model.text.vocabulary_texts(ids) if body.return_token_strs else None,
    )


def detokenize(payload: object, model: ServedModel) -> Detokenized:
    """Return the text of tokens.

    Raises:
        ServeError: the sentence names the field.
    """
    tokens = validate(DetokenizeBody, _given(payload, model)).tokens
    limits = model.limits
    if len(tokens) > limits.max_model_len:
        raise BadRequest(
            f"tokens has {len(tokens)} token ids; the maximum context length is {limits.max_model_len}.", field="tokens"
        )
    if not all(0 <= token_id < limits.vocab_size for token_id in tokens):
        raise BadRequest(f"tokens must hold token ids from 0 to {limits.vocab_size - 1}.", field="tokens")
    return Detokenized(prompt=model.text.full_text(tokens))


def tokenize_router(model: Model) -> APIRouter:
    """Return the routes, to be included in the app."""
    router = APIRouter(tags=[TOKENIZER_TAG])

    # In a thread: a prompt that fills the context takes long enough to stall streams.
    @router.post("/tokenize", name="tokenize", **_body("TokenizePrompt", "TokenizeMessages"))
    async def tokenize_route(request: Request) -> Tokens:
        """Return the tokens of a prompt or of messages."""
        return await asyncio.to_thread(tokenize, parse_json(await request.body()), model.served)

    @router.post("/detokenize", name="detokenize", **_body("DetokenizeBody"))
    async def detokenize_route(request: Request) -> Detokenized:
        """Return the text of tokens."""
        return await asyncio.to_thread(detokenize, parse_json(await request.body()), model.served)

    return router


def _body(*kinds: str) -> dict[str, Any]:
    """Return a route's body in the OpenAPI document, for its decorator."""
    schemas = [{"$ref": f"#/components/schemas/{kind}"} for kind in kinds]
    content = {"application/json": {"schema": {"anyOf": schemas}}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}


def _given(payload: object, model: ServedModel) -> dict[str, Any]:
    """Return the fields of a body, null ones left out."""
    if not isinstance(payload, Mapping):
        raise BadRequest(f"The body must be a JSON object, not {describe(payload)}.", field="body")
    given = {name: value for name, value in payload.items() if value is not None}
    if isinstance(given.get("model"), str):
        check_model(given["model"], model)
    return given
