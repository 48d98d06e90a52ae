"""What is sent and read on the two wire formats: KServe's V1 predict and OpenAI's completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson


@dataclass(frozen=True)
class Target:
    """A URL that streams text, and how to ask it; the wire format is told by the URL's path."""

    url: str
    """`.../v1/models/NAME:predict`, `.../completions` or `.../chat/completions`."""
    max_new_tokens: int
    model: str = ""
    """OpenAI's `model` field; V1 has the name in its path."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every body, as this server wants them (`min_new_tokens`, `ignore_eos`, ...)."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or not self._path.endswith((":predict", "/completions")):
            raise ValueError(f"{self.url!r} is neither a V1 URL (…:predict) nor an OpenAI one (…/completions).")

    @property
    def _path(self) -> str:
        return urlsplit(self.url).path

    def body(self, prompt: str) -> dict[str, Any]:
        """Return a greedy, streamed request for exactly `max_new_tokens` tokens."""
        common = {"temperature": 0, "stream": True, **self.extra}
        if self._path.endswith(":predict"):
            return {"prompt": prompt, "max_new_tokens": self.max_new_tokens, **common}
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": prompt}]}
            if self._path.endswith("/chat/completions")
            else {"prompt": prompt}
        )
        return {
            "model": self.model,
            **asked,
            "max_tokens": self.max_new_tokens,
            "stream_options": {"include_usage": True},
            **common,
        }


@dataclass(frozen=True)
class Event:
    """What one `data:` line said."""

    text: str = ""
    finished: bool = False
    """A finish reason or `[DONE]`: the stream is whole."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None


def read_event(line: bytes) -> Event | None:
    """Return what a line of a stream says in either format, None for lines that say nothing."""
    if not line.startswith(b"data:"):
        return None
    data = line[5:].strip()
    if data == b"[DONE]":
        return Event(finished=True)
    content = orjson.loads(data)
    if "error" in content:
        return Event(error=str(content["error"]))
    choice = content
    usage = content
    if "choices" in content:
        choice = content["choices"][0] if content["choices"] else {}
        usage = content.get("usage") or {}
    text = choice.get("text")
    if text is None:
        text = (choice.get("delta") or {}).get("content")
    return Event(
        text=text or "",
        finished=choice.get("finish_reason") is not None,
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
    )
