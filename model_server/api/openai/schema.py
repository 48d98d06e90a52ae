"""The bodies of OpenAI's API: what a completion and a chat may ask for, by its names and with its defaults.

A field that OpenAI knows and this server does not support is refused unless its value asks for nothing; a field that
OpenAI does not know is refused too. The models are what the OpenAPI document shows. What a body becomes is
`requests.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from model_server.api.tools.messages import CONTENT_RULE, MessageToolCall, TextPart
from model_server.api.tools.schema import ToolFields
from model_server.api.v1.parameters import MAX_LIST, Choices, Grammar
from model_server.api.validation import describe, validate
from model_server.errors import BadRequest

MAX_CHOICES = 128
"""Answers of one call, all prompts together."""

IGNORED_FIELDS = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})
"""Fields for OpenAI's records. No answer depends on them, so they are accepted and ignored."""

NO_OP_VALUES: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}
"""OpenAI's fields that are not supported, each with its values without effect."""

Item = TypeVar("Item")
NotEmpty = Annotated[list[Item], Field(min_length=1)]
TokenIds = NotEmpty[int]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """The contents of a stream besides its text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class NamedSchema(_Strict):
    """A JSON schema as `response_format` has it. Every schema is enforced, `strict` or not."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """The form of the answer: any text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(_Strict):
    """vLLM's field for structured output: one of these grammars."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", title="a JSON schema, as an object or as its text")
    regex: Grammar | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None


class Body(_Strict):
    """The fields that completions and chats share."""

    model: str
    frequency_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=MAX_LIST)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    presence_penalty: float = Field(0, ge=-2, le=2)
    response_format: ResponseFormat | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    temperature: float = Field(1, ge=0, le=2)
    top_p: float = Field(1, gt=0, le=1)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(Body):
    """The body of `POST /openai/v1/completions`."""

    prompt: str | NotEmpty[str] | TokenIds | NotEmpty[TokenIds] = Field(
        title="a string, a list of strings, a list of token ids or a list of such lists, none empty"
    )
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)
    max_tokens: int = Field(16, ge=0)


class StrictTextPart(TextPart):
    """A piece of a message."""

    model_config = ConfigDict(strict=True, extra="forbid")


class ChatMessage(BaseModel):
    """One turn. What an answer of ours holds may be sent back as it came: its empty fields are dropped."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[StrictTextPart] | None, Field(title=CONTENT_RULE)] = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: Annotated[str | None, Field(min_length=1, max_length=256)] = None


class ChatBody(Body, ToolFields):
    """The body of `POST /openai/v1/chat/completions`."""

    messages: NotEmpty[ChatMessage]
    logprobs: bool = False
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)


def as_param(error: BadRequest) -> BadRequest:
    """Return the error with the name of the field alone, without the place in it, as OpenAI's `param` has it."""
    return BadRequest(str(error), field=re.split(r"[.\[]", error.field or "", maxsplit=1)[0])


AnyBody = TypeVar("AnyBody", bound=Body)


def read(kind: type[AnyBody], body: object) -> AnyBody:
    """Return a body of this kind; null means not given.

    Raises:
        BadRequest: the sentence names the field.
    """
    if not isinstance(body, Mapping):
        raise BadRequest(f"The body must be a JSON object, not {describe(body)}.", field="body")
    given = {name: value for name, value in body.items() if value is not None and name not in IGNORED_FIELDS}
    for name in given.keys() & NO_OP_VALUES:
        value = given.pop(name)
        # With its type, because `0 == False`.
        if not any(type(value) is type(no_op) and value == no_op for no_op in NO_OP_VALUES[name]):
            raise BadRequest(f"{name} is not supported here: leave it out.", field=name)
    try:
        parsed = validate(kind, given)
    except BadRequest as error:
        raise as_param(error) from None
    if parsed.stream_options is not None and not parsed.stream:
        raise BadRequest("stream_options needs stream to be true.", field="stream_options")
    return parsed
