"""The types of flags: each converts the text of a value, and has the JSON schema of the values that it accepts."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_Convert = TypeVar("_Convert", bound=Callable[[str], Any])


def _described(convert: _Convert, **schema: Any) -> _Convert:
    """Attach the JSON schema of the values that a converter accepts: the chart's schema is made from it."""
    convert.schema = schema  # type: ignore[attr-defined]
    return convert


def integer(least: int, most: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, not {text!r}")
        return int(text)

    return _described(convert, type="integer", minimum=least, maximum=most)


def seconds(least: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= 86_400:
            raise argparse.ArgumentTypeError(f"must be seconds from {least:g} to 86400, not {text!r}")
        return number

    return _described(convert, type="number", minimum=least, maximum=86_400)


def one_of(*allowed: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(allowed)}, not {text!r}")
        return text

    return _described(convert, type="string", enum=list(allowed))


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() == "true"


def nonempty(value: str) -> str:
    if not value.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def filesystem_path(value: str) -> Path:
    return Path(nonempty(value)).expanduser()


def origin_list(text: str) -> tuple[str, ...]:
    origins = tuple(part.strip() for part in text.split(",") if part.strip())
    for origin in origins:
        if not re.fullmatch(r"\*|https?://[A-Za-z0-9.\-\[\]:]+", origin):
            raise argparse.ArgumentTypeError(
                f"must be origins like https://example.org, separated by commas, or *, not {origin!r}"
            )
    return origins


_described(boolean, type="boolean")
_described(nonempty, type="string")
_described(filesystem_path, type="string", pattern=r"^/[^\x00-\x1f]*$")
_described(origin_list, type="array", items={"type": "string", "pattern": r"^(\*|https?://[A-Za-z0-9.:\[\]-]+)$"})
