"""The bodies of OpenAI's API: what a completion and a chat may ask for, by its names and with its defaults.

A field that OpenAI knows and this server does not support is refused unless its value asks for nothing; a field that
nobody knows is refused too. The models are what the OpenAPI document shows. What a body becomes is `openai.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_server.api.fields import MAX_LIST, check_unicode, shown
from model_server.errors import BadRequest

MAX_CHOICES = 128
"""Answers of one call, all prompts together."""

LABELS = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})
"""For OpenAI's own books: no answer depends on them, so they are taken and dropped."""

ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that are not supported, and the values with which they change nothing."""

FORMS = {
    "prompt": "must be a string, a list of strings, a list of token ids or a list of such lists, none empty",
    "stop": "must be a string, or a list of up to 16, each of 1 to 256 characters",
    "content": 'must be a string or a list of {"type": "text", "text": "..."}',
}
"""What fields of several forms may be, where pydantic would name each form that failed."""

Item = TypeVar("Item")
NotEmpty = Annotated[list[Item], Field(min_length=1)]
TokenIds = NotEmpty[int]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """What is said besides the text of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Body(_Strict):
    """What completions and chats share."""

    model: str
    frequency_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=MAX_LIST)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    presence_penalty: float = Field(0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1, ge=0, le=2)
    top_p: float = Field(1, gt=0, le=1)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(Body):
    """The body of `POST /openai/v1/completions`."""

    prompt: str | NotEmpty[str] | TokenIds | NotEmpty[TokenIds]
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)
    max_tokens: int = Field(16, ge=0)


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. What an answer of ours holds may be sent back as it came: its empty fields are dropped."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class ChatBody(Body):
    """The body of `POST /openai/v1/chat/completions`."""

    messages: NotEmpty[Message]
    logprobs: bool = False
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)


AnyBody = TypeVar("AnyBody", bound=Body)


def read(kind: type[AnyBody], body: object) -> AnyBody:
    """Return a body of this kind; null means not given.

    Raises:
        BadRequest: the sentence names the field.
    """
    if not isinstance(body, Mapping):
        raise BadRequest(f"The body must be a JSON object, not {shown(body)}.", field="body")
    given = {name: value for name, value in body.items() if value is not None and name not in LABELS}
    for name in given.keys() & ASKS_FOR_NOTHING:
        if given.pop(name) not in ASKS_FOR_NOTHING[name]:
            raise BadRequest(f"{name} is not supported here: leave it out.", field=name)
    try:
        asked = kind.model_validate(given)
    except ValidationError as error:
        raise _bad(error) from None
    for stop in asked.stops:
        check_unicode(stop, "stop")
    if asked.stream_options is not None and not asked.stream:
        raise BadRequest("stream_options needs stream to be true.", field="stream_options")
    return asked


def _bad(error: ValidationError) -> BadRequest:
    """Say the first thing that is wrong, without repeating what was sent."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path: list[str] = []
    form = None
    for part in first["loc"]:
        if isinstance(part, int):
            path.append(f"[{part}]")
        else:
            path.append(ascii(part[:64])[1:-1] if not path else f".{ascii(part[:64])[1:-1]}")
            form = FORMS.get(part)
        if form:
            break
    label = "".join(path)
    rule = {
        "extra_forbidden": "is not a field of this request",
        "missing": "must be given",
    }.get(first["type"], "must" + first["msg"].removeprefix("Input should").replace("Field required", "be given"))
    return BadRequest(f"{label} {form or rule}.", field=str(first["loc"][0])[:64])
