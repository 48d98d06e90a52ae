"""The body of `POST /openai/v1/responses`: read, and turned into the chat that it stands for.

Leaves out how the answer is written (`response_output.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from model_server.api.openai.requests import OpenAICall, parse_chat
from model_server.api.openai.schema import as_param
from model_server.api.prompts import Call, ServedModel
from model_server.api.tools.schema import MAX_TOOLS
from model_server.api.validation import describe, validate
from model_server.errors import BadRequest

NOTHING_IS_KEPT = "this server keeps no responses; send the earlier items in input"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "background": ((False,), "an answer is sent in the response to its request"),
    "conversation": ((), NOTHING_IS_KEPT),
    "include": (([],), "an answer has its text and its calls alone"),
    "max_tool_calls": ((), "tools are called by the client"),
    "previous_response_id": ((), NOTHING_IS_KEPT),
    "prompt": ((), "this server keeps no prompts; send input"),
    "reasoning": (({},), "the model does not reason before it answers"),
    "service_tier": (("auto", "default"), "all requests are served alike"),
    "store": ((False,), NOTHING_IS_KEPT),
    "top_logprobs": ((0,), "log-probabilities are answered to chats and completions"),
    "truncation": (("disabled",), "a prompt that is too long is refused"),
}
"""OpenAI's fields that are not supported, each with its values without effect and the reason."""
IGNORED = frozenset({"prompt_cache_key", "safety_identifier", "user"})
TEXT_PARTS = ("input_text", "output_text", "text")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextFormat(_Strict):
    """The form of the text: any text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(_Strict):
    """The form of the text."""

    format: TextFormat | None = None


class FunctionTool(_Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(_Strict):
    """The one function that the answer must call."""

    type: Literal["function"]
    name: str


class NoObfuscation(_Strict):
    """Events have no padding."""

    include_obfuscation: Literal[False] = False


class ResponseBody(_Strict):
    """The body of `POST /openai/v1/responses`."""

    model: str
    input: Annotated[str | list[dict[str, Any]], Field(title="a string or a list of items")]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    stream: bool = False
    stream_options: NoObfuscation | None = None
    temperature: float = Field(1, ge=0, le=2)
    text: TextConfig = TextConfig()
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedFunction,
        Field(title='"none", "auto", "required" or {"type": "function", "name": "..."}'),
    ] = "auto"
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] = []
    top_p: float = Field(1, gt=0, le=1)


class _Item(BaseModel):
    """An item of the input. What an answer of ours holds may be sent back as it came."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _MessageItem(_Item):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[dict[str, Any]], Field(title="a string or a list of text parts")]


class _CallItem(_Item):
    call_id: str
    name: str
    arguments: str


class _OutputItem(_Item):
    call_id: str
    output: Annotated[str | list[dict[str, Any]], Field(title="a string or a list of text parts")]


@dataclass(frozen=True, eq=False, kw_only=True)
class ResponseCall(Call):
    """One call: the chat that it stands for, and the body, which the answer repeats."""

    chat: OpenAICall
    body: ResponseBody


def parse_response(
    payload: object, model: ServedModel, request_id: str = "", deadline_s: float | None = None
) -> ResponseCall:
    """Turn the body of a response into a request that cannot be invalid.

    Raises:
        ServeError: the sentence names the field.
    """
    if not isinstance(payload, Mapping):
        raise BadRequest(f"The body must be a JSON object, not {describe(payload)}.", field="body")
    given = {name: value for name, value in payload.items() if value is not None and name not in IGNORED}
    for name in given.keys() & REFUSED:
        allowed, reason = REFUSED[name]
        value = given.pop(name)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise BadRequest(f"{name} is not supported here: {reason}.", field=name)
    try:
        body = validate(ResponseBody, given)
        messages, places = _messages(body)
    except BadRequest as error:
        raise as_param(error) from None
    try:
        chat = parse_chat(_chat(body, messages), model, request_id, deadline_s)
    except BadRequest as error:
        raise _as_written(error, places) from None
    return ResponseCall(requests=chat.requests, stream=body.stream, chat=chat, body=body)


def _chat(body: ResponseBody, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the body of the chat."""
    chat: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stream": body.stream,
        "max_completion_tokens": body.max_output_tokens,
        "parallel_tool_calls": body.parallel_tool_calls,
        "tools": [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in body.tools
        ],
        "tool_choice": body.tool_choice,
    }
    if isinstance(body.tool_choice, NamedFunction):
        chat["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    if body.text.format is not None:
        named = body.text.format.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
        chat["response_format"] = {"type": body.text.format.type} | ({"json_schema": named} if named else {})
    return chat


def _messages(body: ResponseBody) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the messages of the chat, and the place of each in the body."""
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    for place, message in _each_message(body):
        calls = message.get("tool_calls")
        if calls and messages and messages[-1]["role"] == "assistant":  # the calls of one answer are one message
            messages[-1].setdefault("tool_calls", []).extend(calls)
        else:
            messages.append(message)
            places.append(place)
    return messages, places


def _each_message(body: ResponseBody) -> Iterator[tuple[str, dict[str, Any]]]:
    if body.instructions:
        yield "instructions", {"role": "system", "content": body.instructions}
    if isinstance(body.input, str):
        yield "input", {"role": "user", "content": body.input}
        return
    for i, item in enumerate(body.input):
        here = f"input[{i}]"
        kind = item.get("type", "message")
        if kind == "message":
            message = _read(_MessageItem, item, here)
            yield here, {"role": message.role, "content": _text(message.content, f"{here}.content")}
        elif kind == "function_call":
            call = _read(_CallItem, item, here)
            function = {"name": call.name, "arguments": call.arguments}
            calls = [{"id": call.call_id, "type": "function", "function": function}]
            yield here, {"role": "assistant", "content": None, "tool_calls": calls}
        elif kind == "function_call_output":
            output = _read(_OutputItem, item, here)
            content = _text(output.output, f"{here}.output")
            yield here, {"role": "tool", "tool_call_id": output.call_id, "content": content}
        else:
            raise BadRequest(
                f"{here}.type must be message, function_call or function_call_output, not {describe(kind)}.",
                field="input",
            )


def _read(kind: type[Any], item: Mapping[str, Any], here: str) -> Any:
    return validate(kind, item, {name: f"{here}.{name}" for name in kind.model_fields})


def _text(content: str | list[dict[str, Any]], here: str) -> str:
    """Return a content that is one string or a list of text parts."""
    if isinstance(content, str):
        return content
    for j, part in enumerate(content):
        if part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise BadRequest(f'{here}[{j}] must be {{"type": "input_text", "text": "..."}}.', field="input")
    return "".join(part["text"] for part in content)


def _as_written(error: BadRequest, places: list[str]) -> BadRequest:
    """Return an error of the chat with the names that the body has.

    Only the place that the sentence begins with is renamed, and one that it ends with: the rest may quote the client.
    """
    place, space, rest = str(error).partition(" ")
    if error.field == "messages":
        place = re.sub(r"^messages\[(\d+)\]", lambda match: places[int(match[1])], place)
        rest = re.sub(r"(?<=before )messages\[(\d+)\](?=\.$)", lambda match: places[int(match[1])], rest)
    for ours, theirs in (
        ("messages", "input"),
        ("response_format.json_schema", "text.format"),
        ("response_format", "text.format"),
        ("].function.", "]."),
        (".tool_call_id", ".call_id"),
    ):
        place = place.replace(ours, theirs)
    names = {"messages": "input", "response_format": "text"}
    return BadRequest(place + space + rest, field=names.get(error.field or "", error.field))
