"""Makes the request body from the command line: a prompt, JSON text or a JSON file, and single parameters.

The parameters are not checked here: the server checks them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .exit_codes import Misused

Body = dict[str, Any]


def build(prompt: str | None, data: str | None, file: Path | None, chat: bool, parameters: Iterable[str]) -> Body:
    """Return the body that prompt, data or file gives; with none of them the prompt comes from stdin.

    Raises:
        Misused: there are two of them, or one cannot be read.
    """
    if sum(source is not None for source in (prompt, data, file)) > 1:
        raise Misused("Pass only one of PROMPT, --data and --file.")
    if data is not None or file is not None:
        if chat:
            raise Misused("--chat goes with PROMPT; in --data and --file write messages.")
        body = _object(data, "--data") if data is not None else _object(_read(file), f"--file {file}")
    else:
        text = _prompt_from_stdin() if prompt in (None, "-") else prompt
        body = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    return body | dict(map(_parameter, parameters))


def streams(body: Body, wanted: bool | None, on_terminal: bool) -> bool:
    """Return whether to stream: the flag, else the body, else true for one answer on a terminal."""
    if wanted is not None:
        return wanted
    if "stream" in body:
        return bool(body["stream"])
    return on_terminal and "instances" not in body and body.get("num_return_sequences", 1) == 1


def _object(text: str, source: str) -> Body:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise Misused(f"{source} is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise Misused(f'{source} must be a JSON object, such as {{"prompt": "..."}}.')
    return body


def _read(file: Path | None) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else Path(str(file)).read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise Misused(f"--file {file} cannot be read: {error}.") from error


def _prompt_from_stdin() -> str:
    if sys.stdin.isatty():
        raise Misused("Pass a PROMPT, --data or --file, or pipe a prompt in.")
    # The shell adds a newline that is not part of the prompt.
    text = sys.stdin.read().removesuffix("\n")
    if not text:
        raise Misused("No prompt: stdin is empty.")
    return text


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise Misused(f"--param {text!r} is not NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
