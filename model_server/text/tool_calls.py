"""Tool calls in an answer: from tokens to text, and from text to content and calls.

Mistral's v3 format is the token `[TOOL_CALLS]`, then `[{"name": "f", "arguments": {...}}, ...]`. The grammar
(`tool_grammar.py`) allows nothing else behind the token. An answer that ends early may still be cut anywhere: text that
is no call becomes content. Knows no tokenizer and no API.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass

from model_server.request import Detokenizer

MARK = "\ud800"
"""Stands for `[TOOL_CALLS]` in a text. Half of a surrogate pair, which no decoded token holds."""

ID_LENGTH = 9
_ID_ALPHABET = string.ascii_letters + string.digits


def new_id() -> str:
    """Return an id for a tool call, in the form that Mistral's format has."""
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(ID_LENGTH))


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What a tool call has gained: the first one of a call has its id and its name."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


Delta = str | ToolCallDelta
"""More content, or more of a tool call."""


@dataclass(slots=True)
class ToolCall:
    """A call that the model asks for; the arguments are JSON unless the answer was cut."""

    id: str
    name: str
    arguments: str = ""


class ToolCallDetokenizer:
    """The text of an answer that may call tools (`request.Detokenizer`): its content, `MARK`, its tool calls.

    Stop strings end the content. They are not looked for in tool calls, which a grammar ends.
    """

    def __init__(self, content: Detokenizer, calls: Detokenizer, tool_calls_id: int) -> None:
        """Take a detokenizer for the content, one without stop strings for the calls, and the token between them."""
        self.stopped = False
        self._content, self._calls = content, calls
        self._tool_calls_id = tool_calls_id
        self._in_calls = False

    def push(self, token_id: int) -> str:
        """Return the text that this token completes, often ''."""
        if self._in_calls:
            return self._calls.push(token_id)
        if token_id != self._tool_calls_id:
            text = self._content.push(token_id)
            self.stopped = self._content.stopped
            return text
        text = self._content.flush()
        self.stopped = self._content.stopped
        self._in_calls = not self.stopped
        return text + MARK if self._in_calls else text

    def flush(self) -> str:
        """Return the text that was held back, at the end of the answer."""
        if self._in_calls:
            return self._calls.flush()
        text = self._content.flush()
        self.stopped = self._content.stopped
        return text


class ToolCallParser:
    """Splits the text of one answer into its content and its tool calls, piece by piece."""

    def __init__(self, make_id: Callable[[], str] = new_id) -> None:
        self.content = ""
        self.calls: list[ToolCall] = []
        self._make_id = make_id
        self._in_calls = False
        self._arguments: _JSONObject | None = None
        """Where the parser stands in the arguments of the last call; None between calls."""
        self._unread = ""

    def push(self, text: str) -> list[Delta]:
        """Take more of the text; return what it adds."""
        deltas: list[Delta] = []
        if not self._in_calls:
            content, mark, text = text.partition(MARK)
            deltas += self._add_content(content)
            self._in_calls = bool(mark)
        self._unread += text
        while self._in_calls:
            if self._arguments is None:
                head = _HEAD[bool(self.calls)].match(self._unread)
                if head is None:
                    break
                self.calls.append(ToolCall(self._make_id(), head[1]))
                deltas.append(ToolCallDelta(len(self.calls) - 1, id=self.calls[-1].id, name=head[1]))
                self._arguments, self._unread = _JSONObject(), self._unread[head.end() :]
            length = self._arguments.read(self._unread)
            if not length:
                break
            arguments, self._unread = self._unread[:length], self._unread[length:]
            self.calls[-1].arguments += arguments
            deltas.append(ToolCallDelta(len(self.calls) - 1, arguments))
            if self._arguments.complete:
                self._arguments = None
        return deltas

    def finish(self) -> list[Delta]:
        """Take the end of the answer; return the text that is no call, as a call that was cut in its name."""
        unread, self._unread = self._unread, ""
        if self.calls:
            unread = "" if _TAIL.startswith(unread) else unread.removeprefix("}")
        return self._add_content(unread)

    def _add_content(self, text: str) -> list[Delta]:
        self.content += text
        return [text] if text else []


_CALL = r'\{"name": "([a-zA-Z0-9_-]+)", "arguments": '
_HEAD = (re.compile(r" ?\[" + _CALL), re.compile(r"\}, " + _CALL))
"""What stands before the arguments of the first call, and of a further one."""
_TAIL = "}]"


class _JSONObject:
    """Finds the end of a JSON object that comes piece by piece."""

    def __init__(self) -> None:
        self.complete = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def read(self, text: str) -> int:
        """Return how many characters of the text belong to the object."""
        for i, char in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
            if self._depth == 0:
                self.complete = True
                return i + 1
        return len(text)
