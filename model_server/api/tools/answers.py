"""Tool calls as an answer has them, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from model_server.text.tool_calls import ToolCall, ToolCallDelta

FINISH_REASON = "tool_calls"
"""The finish reason of an answer with tool calls, unless it reached a limit."""


def written(call: ToolCall) -> dict[str, Any]:
    """Return a call as a complete answer has it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def written_delta(delta: ToolCallDelta) -> dict[str, Any]:
    """Return what a call has gained as a chunk of a stream has it."""
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}
