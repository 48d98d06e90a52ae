"""One streamed request over HTTP, in the server's V1 format or OpenAI's, read event by event with the times."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson


@dataclass(frozen=True)
class Target:
    """A URL that streams text; its path decides the format of the body."""

    url: str
    """`.../v1/models/NAME:predict` or `.../completions`."""
    max_new_tokens: int
    model: str = ""
    """OpenAI's `model` field; V1 has the name in its path."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of every body, such as `min_new_tokens` or `ignore_eos`."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or not self._path.endswith((":predict", "/completions")):
            raise ValueError(f"{self.url!r} is neither a V1 URL (…:predict) nor an OpenAI one (…/completions).")

    @property
    def _path(self) -> str:
        return urlsplit(self.url).path

    def body(self, prompt: str) -> dict[str, Any]:
        """Return a greedy, streamed request for exactly `max_new_tokens` tokens."""
        common = {"prompt": prompt, "temperature": 0, "stream": True}
        if self._path.endswith(":predict"):
            return {**common, "max_new_tokens": self.max_new_tokens, **self.extra}
        openai = {"model": self.model, "max_tokens": self.max_new_tokens, "stream_options": {"include_usage": True}}
        return {**common, **openai, **self.extra}


@dataclass
class Answer:
    """One request as its client saw it. Times are `time.perf_counter()` seconds."""

    asked_s: float
    chunk_times_s: list[float] = field(default_factory=list)
    """When each piece of text arrived."""
    ended_s: float | None = None
    """None: cut at the time limit."""
    completion_tokens: int | None = None
    """As the server counts; None when it sends no usage."""
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        """The server's count, else one token for each piece of text."""
        return len(self.chunk_times_s) if self.completion_tokens is None else self.completion_tokens


Ask = Callable[[str, Answer], Coroutine[None, None, None]]
"""Sends a prompt and records the response in the answer."""


@asynccontextmanager
async def asking(target: Target) -> AsyncIterator[Ask]:
    """Open a client with a new connection for each request: llama.cpp closes a used one while the next is sent."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        headers=dict(target.headers),
    ) as session:
        yield functools.partial(_ask, session, target)


async def _ask(session: aiohttp.ClientSession, target: Target, prompt: str, answer: Answer) -> None:
    try:
        async with session.post(target.url, json=target.body(prompt)) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return
            await _read(response.content, answer)
    except (aiohttp.ClientError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    wanted, got = target.max_new_tokens, answer.output_tokens
    # Without a count from the server a piece of text may hold several tokens.
    if answer.error is None and (got == 0 or got > wanted or (answer.completion_tokens is not None and got < wanted)):
        answer.error = f"asked for {wanted} tokens, got {got}"


async def _read(content: aiohttp.StreamReader, answer: Answer) -> None:
    finished, rest = False, b""
    # Chunks and not lines: the client shares the server's cores, and reading line by line takes twice the time.
    async for chunk in content.iter_any():
        now_s = time.perf_counter()
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                finished |= _read_event(line[5:].strip(), answer, now_s)
    if not finished and answer.error is None:
        answer.error = "the stream ended without a finish reason"
    answer.ended_s = time.perf_counter()


def _read_event(data: bytes, answer: Answer, now_s: float) -> bool:
    """Add one event to the answer; return whether it ends the stream."""
    if data == b"[DONE]":
        return True
    event = orjson.loads(data)
    if "error" in event:
        answer.error = str(event["error"])
        return True
    choice = usage = event
    if "choices" in event:
        choice = event["choices"][0] if event["choices"] else {}
        usage = event.get("usage") or {}
    if choice.get("text"):
        answer.chunk_times_s.append(now_s)
    answer.completion_tokens = usage.get("completion_tokens", answer.completion_tokens)
    return choice.get("finish_reason") is not None
