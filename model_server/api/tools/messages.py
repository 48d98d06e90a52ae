"""The messages of a conversation: their form, and the rules between them.

`conversation` returns them as chat templates take them (`text/chat.py`). Which roles there are is the template's rule.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from model_server.api.validation import check_unicode
from model_server.errors import BadRequest
from model_server.text.tool_calls import ID_LENGTH

CONTENT_RULE = 'a string or a list of {"type": "text", "text": "..."}'
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
NAME_RULE = "must be 1 to 64 letters, digits, underscores and dashes"
NOT_SUPPORTED = (
    "this model cannot call tools: its tokenizer has no tool tokens ([TOOL_CALLS], ...), or its chat template has none"
)

_ID = re.compile(rf"[a-zA-Z0-9]{{{ID_LENGTH}}}")
_DIGITS = string.ascii_letters + string.digits


class TextPart(BaseModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """A function that the model called, with its arguments as JSON."""

    model_config = ConfigDict(strict=True, extra="forbid")
    name: str
    arguments: str
    parsed_arguments: Any = Field(None, description="as the `openai` client adds it to a streamed answer; ignored")


class MessageToolCall(BaseModel):
    """A tool call of an earlier answer."""

    model_config = ConfigDict(strict=True, extra="forbid")
    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="as the chunks of a stream have it; ignored")


class Message(BaseModel):
    """One turn of a conversation. Which roles there are is the chat template's rule."""

    model_config = ConfigDict(strict=True, extra="forbid")
    role: str = Field(min_length=1, max_length=64)
    content: Annotated[str | list[TextPart] | None, Field(title=CONTENT_RULE)] = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: Annotated[str | None, Field(min_length=1, max_length=256)] = None


class AnyMessage(Protocol):
    """A message of either API."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str | Sequence[TextPart] | None: ...

    @property
    def tool_calls(self) -> list[MessageToolCall] | None: ...

    @property
    def tool_call_id(self) -> str | None: ...


def content_text(content: str | Iterable[TextPart], label: str) -> str:
    """Return a message's text, given as one string or as parts."""
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    check_unicode(text, label)
    return text


def conversation(messages: Sequence[AnyMessage], label: str) -> list[dict[str, Any]]:
    """Return messages in the form of a chat template.

    Raises:
        BadRequest: a message lacks its content, or the results do not belong to the calls before them.
    """
    found: list[dict[str, Any]] = []
    unanswered: dict[str, str] = {}
    """The calls without a result, by id, with the place of each."""
    for i, message in enumerate(messages):
        here = f"{label}[{i}]"
        if message.role == "tool":
            if message.tool_call_id is None:
                raise BadRequest(f'{here}.tool_call_id must be given with the role "tool".', field=label)
            if message.tool_call_id not in unanswered:
                raise BadRequest(
                    f"{here}.tool_call_id must be the id of a call of the assistant's message before it, used once.",
                    field=label,
                )
            del unanswered[message.tool_call_id]
        else:
            _check_answered(unanswered, here, label)
        found.append(_message(message, here, label))
        for j, call in enumerate(message.tool_calls or ()):
            if call.id in unanswered:
                raise BadRequest(f"{here}.tool_calls[{j}].id must differ from the other calls' ids.", field=label)
            unanswered[call.id] = f"{here}.tool_calls[{j}]"
    _check_answered(unanswered, "the end", label)
    return found


def format_id(call_id: str) -> str:
    """Return a tool call's id in Mistral's format: itself, or another that always stands for it.

    The format has ids of nine letters and digits. Other servers make longer ones.
    """
    if _ID.fullmatch(call_id):
        return call_id
    number = int.from_bytes(hashlib.sha256(call_id.encode(errors="surrogatepass")).digest())
    return "".join(_DIGITS[number // len(_DIGITS) ** i % len(_DIGITS)] for i in range(ID_LENGTH))


def uses_tools(messages: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a conversation has tool calls or results."""
    return any(message["role"] == "tool" or "tool_calls" in message for message in messages)


def _message(message: AnyMessage, here: str, label: str) -> dict[str, Any]:
    written: dict[str, Any] = {"role": message.role}
    if message.content is not None:
        written["content"] = content_text(message.content, f"{here}.content")
    elif message.role == "assistant" and message.tool_calls:
        written["content"] = ""
    else:
        raise BadRequest(f"{here}.content must be given.", field=label)
    if message.tool_call_id is not None:
        if message.role != "tool":
            raise BadRequest(f'{here}.tool_call_id must be left out without the role "tool".', field=label)
        written["tool_call_id"] = format_id(message.tool_call_id)
    if message.tool_calls:
        if message.role != "assistant":
            raise BadRequest(f'{here}.tool_calls must be left out without the role "assistant".', field=label)
        written["tool_calls"] = [
            _call(call, f"{here}.tool_calls[{j}].function", label) for j, call in enumerate(message.tool_calls)
        ]
    return written


def _call(call: MessageToolCall, here: str, label: str) -> dict[str, Any]:
    if not NAME.fullmatch(call.function.name):
        raise BadRequest(f"{here}.name {NAME_RULE}.", field=label)
    check_unicode(call.function.arguments, f"{here}.arguments")
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": format_id(call.id), "type": "function", "function": function}


def _check_answered(unanswered: dict[str, str], before: str, label: str) -> None:
    for place in unanswered.values():
        raise BadRequest(f'{place} has no result: add a message with the role "tool" before {before}.', field=label)
