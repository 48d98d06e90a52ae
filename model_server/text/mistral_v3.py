"""The prompt of Mistral 7B Instruct v0.3: a conversation as control tokens and texts, as mistral-common encodes it.

It replaces the chat template of a checkpoint whose own is known to differ from the format that the model was trained
on. That template drops the system prompt behind a tool's result and does not quote a result or a description as JSON.
Leaves out which conversations are valid (`api/tools/messages.py`) and how a text becomes tokens (`tokenizer.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model_server.errors import BadRequest

Message = Mapping[str, Any]

KNOWN_TEMPLATES = frozenset({"fcaa5704769aa4c8b7b173295cc0344394bb4464ee9e52ff9a77755cc558b966"})
"""SHA-256 of the templates to replace, white space left out: the one on the Hub since its tools were added."""


@dataclass(frozen=True, slots=True)
class Control:
    """A control token. The same characters in a message are text."""

    token: str


Part = Control | str

BOS, EOS = Control("<s>"), Control("</s>")
INST, END_INST = Control("[INST]"), Control("[/INST]")
AVAILABLE_TOOLS, END_AVAILABLE_TOOLS = Control("[AVAILABLE_TOOLS]"), Control("[/AVAILABLE_TOOLS]")
TOOL_CALLS = Control("[TOOL_CALLS]")
TOOL_RESULTS, END_TOOL_RESULTS = Control("[TOOL_RESULTS]"), Control("[/TOOL_RESULTS]")
ROLES = ("system", "user", "assistant", "tool")
TOOL_TOKENS = (AVAILABLE_TOOLS, END_AVAILABLE_TOOLS, TOOL_CALLS, TOOL_RESULTS, END_TOOL_RESULTS)


def is_known_template(template: object) -> bool:
    """Return whether a chat template is one that this module replaces."""
    if not isinstance(template, str):
        return False
    return hashlib.sha256("".join(template.split()).encode()).hexdigest() in KNOWN_TEMPLATES


def prompt_parts(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[Part]:
    """Return the prompt up to the answer.

    The system messages and the tools stand at the last user message. Messages of one role in a row are one turn.

    Raises:
        BadRequest: a message has a role that the format does not have.
    """
    if not {message["role"] for message in messages} <= set(ROLES):
        raise BadRequest(f"messages must have the roles {', '.join(ROLES)}.", field="messages")
    system = _joined([message for message in messages if message["role"] == "system"])
    turns = _turns(messages)
    last_user = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
    parts: list[Part] = [BOS]
    for i, turn in enumerate(turns):
        content = turn["content"]
        if turn["role"] == "tool":
            result = {"content": parsed_json(content), "call_id": turn["tool_call_id"]}
            parts += [TOOL_RESULTS, _written(result), END_TOOL_RESULTS]
        elif turn["role"] == "assistant":
            parts.append(content.rstrip(" "))
            if turn["tool_calls"]:
                parts += [TOOL_CALLS, _written([_call(call) for call in turn["tool_calls"]])]
            parts.append(EOS)
        else:
            if i == last_user:
                if tools:
                    parts += [AVAILABLE_TOOLS, _written(list(tools)), END_AVAILABLE_TOOLS]
                content = f"{system}\n\n{content}" if system else content
            parts += [INST, content, END_INST]
    return [part for part in parts if part != ""]


def prompt_text(parts: Sequence[Part]) -> str:
    """Return a prompt for people: its tokens in characters."""
    return "".join(part.token if isinstance(part, Control) else f" {part}" for part in parts)


def parsed_json(text: str) -> Any:
    """Return the value of a JSON text, `{}` for an empty one, or the text itself if it is not JSON."""
    try:
        value = json.loads(text or "{}")
        _written(value)
    except (ValueError, RecursionError):  # also a number of too many digits, or half of a surrogate pair
        return text
    return value


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the turns after the system prompt, a user's first. Every tool result is a turn."""
    turns: list[dict[str, Any]] = []
    for role, group in itertools.groupby(messages, key=lambda message: message["role"]):
        same = list(group)
        if role == "tool":
            turns += [dict(message) for message in same]
        elif role != "system":
            calls = [call for message in same for call in message.get("tool_calls", ())]
            turns.append({"role": role, "content": _joined(same), "tool_calls": calls})
    if not turns or turns[0]["role"] != "user":
        turns.insert(0, {"role": "user", "content": ""})
    return turns


def _joined(messages: Sequence[Message]) -> str:
    return "\n\n".join(message["content"] for message in messages if message["content"])


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {"name": function["name"], "arguments": parsed_json(function["arguments"]), "id": call["id"]}


def _written(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    text.encode()
    return text
