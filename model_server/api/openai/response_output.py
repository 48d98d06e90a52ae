"""The answer of `POST /openai/v1/responses`: whole, or as the events of a stream.

Both are written by one `ResponseWriter`, so that the last event of a stream is the whole answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import orjson

from model_server.api.http.streaming import after_first
from model_server.api.openai.choice import Choice, Json
from model_server.api.openai.response_input import ResponseCall
from model_server.request import Event
from model_server.text.tool_calls import ToolCallDelta


async def answer(call: ResponseCall) -> Json:
    """Return the whole answer.

    Raises:
        ServeError: it failed.
    """
    writer = ResponseWriter(call)
    async with contextlib.aclosing(call.requests[0].answer()) as events:
        async for event in events:
            for _ in writer.add(event):
                pass
    return writer.response


async def sse(call: ResponseCall) -> AsyncGenerator[bytes, None]:
    """Wait for the first event, then return the server-sent events.

    Raises:
        ServeError: the call failed before its first event; nothing has been sent. A later failure is raised by the
            iterator; the middleware makes it the stream's last event.
    """
    return _frames(call, await after_first(call.requests[0].answer()))


async def _frames(call: ResponseCall, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    writer = ResponseWriter(call)
    try:
        for written in writer.opening():
            yield _frame(written)
        async for event in events:
            for written in writer.add(event):
                yield _frame(written)
    finally:
        await events.aclose()
        call.cancel()


def _frame(event: Json) -> bytes:
    return b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"


class ResponseWriter:
    """An answer as it grows: its items are one message, or the calls of functions, or both."""

    def __init__(self, call: ResponseCall) -> None:
        self.response = _envelope(call)
        self._call = call
        self._choice = Choice(call.chat, 0)
        self._items: list[Json] = self.response["output"]
        self._is_open = False
        """The last item may grow."""
        self._num_events = 0

    def opening(self) -> Iterator[Json]:
        """Yield the events before the first text."""
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def add(self, event: Event) -> Iterator[Json]:
        """Take an event in; yield what it makes of the answer."""
        piece = self._choice.add(event)
        if piece is None:
            return
        for delta in piece.deltas:
            yield from self._add_text(delta) if isinstance(delta, str) else self._add_call(delta)
        if piece.finish_reason is not None:
            if not self._items:
                yield from self._add_text("")
            yield from self._finish(piece.finish_reason)

    def _add_text(self, text: str) -> Iterator[Json]:
        if not (self._is_open and self._item["type"] == "message"):
            message = {"type": "message", "id": self._new_id("msg"), "role": "assistant", "content": []}
            yield from self._open(message)
            self._item["content"].append({"type": "output_text", "text": "", "annotations": []})
            yield self._item_event("response.content_part.added", content_index=0, part=self._item["content"][0])
        self._item["content"][0]["text"] += text
        if text:
            yield self._item_event("response.output_text.delta", content_index=0, delta=text, logprobs=[])

    def _add_call(self, delta: ToolCallDelta) -> Iterator[Json]:
        if delta.name is not None:
            yield from self._open(
                {
                    "type": "function_call",
                    "id": self._new_id("fc"),
                    "call_id": delta.id,
                    "name": delta.name,
                    "arguments": "",
                }
            )
        self._item["arguments"] += delta.arguments
        if delta.arguments:
            yield self._item_event("response.function_call_arguments.delta", delta=delta.arguments)

    def _open(self, item: Json) -> Iterator[Json]:
        yield from self._close("completed")
        self._items.append(item | {"status": "in_progress"})
        self._is_open = True
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=self._item)

    def _close(self, status: str) -> Iterator[Json]:
        if not self._is_open:
            return
        self._is_open = False
        item = self._item
        item["status"] = status
        if item["type"] == "message":
            [part] = item["content"]
            yield self._item_event("response.output_text.done", content_index=0, text=part["text"], logprobs=[])
            yield self._item_event("response.content_part.done", content_index=0, part=part)
        else:
            yield self._item_event(
                "response.function_call_arguments.done", name=item["name"], arguments=item["arguments"]
            )
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _finish(self, reason: str) -> Iterator[Json]:
        status = "incomplete" if reason == "length" else "completed"
        yield from self._close(status)
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response |= {"status": status, "usage": self._usage()}
        yield self._event(f"response.{status}", response=self.response)

    def _usage(self) -> Json:
        num_input, num_output = self._call.chat.num_prompt_tokens, self._choice.completion_tokens
        cached = self._call.requests[0].num_cached_tokens
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_input + num_output,
        }

    @property
    def _item(self) -> Json:
        return self._items[-1]

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._call.chat.id}{len(self._items)}"

    def _item_event(self, kind: str, **fields: Any) -> Json:
        return self._event(kind, output_index=len(self._items) - 1, item_id=self._item["id"], **fields)

    def _event(self, kind: str, **fields: Any) -> Json:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}


def _envelope(call: ResponseCall) -> Json:
    """Return the answer before its first text; it repeats what was asked for."""
    body = call.body
    text_format = body.text.format
    return {
        "id": f"resp_{call.chat.id}",
        "object": "response",
        "created_at": call.chat.created_s,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "model": call.chat.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": None,
        "service_tier": "default",
        "store": False,
        "temperature": body.temperature,
        "text": {
            "format": text_format.model_dump(by_alias=True, exclude_none=True) if text_format else {"type": "text"}
        },
        "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools],
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
    }
