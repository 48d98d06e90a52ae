"""The input: one request a line, in the form of OpenAI's batch files.

    {"custom_id": "a", "method": "POST", "url": "/openai/v1/chat/completions", "body": {...}}

A line that is wrong becomes a value with its reason, so that one bad line does not stop the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_ID_CHARS = 512


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A request that can be sent."""

    line: int
    """Counted from 1."""
    custom_id: str
    path: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class InvalidLine:
    """A line that cannot be sent."""

    line: int
    reason: str
    custom_id: str | None = None
    """None when the line has none that could be read."""


def read(file: BinaryIO) -> Iterator[BatchRequest | InvalidLine]:
    """Yield the lines of a file, one at a time; empty lines are skipped."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield InvalidLine(number, f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB")
        elif line.strip():
            yield _parse(number, line)


def count_lines(path: Path) -> int:
    """Return how many lines a file has, for the progress bar; empty ones count."""
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b"")) + _unterminated(path)


def _unterminated(path: Path) -> int:
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return 0
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _parse(number: int, line: bytes) -> BatchRequest | InvalidLine:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        return InvalidLine(number, f"not JSON: {error}")
    if not isinstance(content, dict):
        return InvalidLine(number, "not a JSON object")
    custom_id = content.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_CHARS:
        return InvalidLine(number, f"custom_id must be a text of 1 to {MAX_ID_CHARS} characters")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        return InvalidLine(number, "custom_id has half of a surrogate pair")
    reason = _fault(content)
    if reason is not None:
        return InvalidLine(number, reason, custom_id)
    return BatchRequest(number, custom_id, content["url"], content["body"])


def _fault(content: dict[str, Any]) -> str | None:
    if content.get("method", "POST") != "POST":
        return f"method must be POST, not {content['method']!r}"
    url, body = content.get("url"), content.get("body")
    if not isinstance(url, str) or not url.startswith("/") or not url.isprintable() or " " in url:
        return 'url must be a path of the server, such as "/openai/v1/chat/completions"'
    if not isinstance(body, dict):
        return "body must be a JSON object"
    if body.get("stream"):
        return "body.stream must be false: a batch stores complete answers"
    return None
