"""Server-sent events out of bytes, however the network cut them. Knows nothing of what the events mean.

Lines end with LF, CR or CRLF and with nothing else. `str.splitlines` (and so httpx's `iter_lines`) also
breaks at U+2028 and its kin, which JSON leaves as they are: an answer with one of them would lose an event.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its name ('' when the stream gave none) and its data."""

    name: str
    data: str


class EventStream:
    """Iterate over the whole events of a body; then `rest` holds what followed the last of them."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks
        self.rest = ""

    def __iter__(self) -> Iterator[Event]:
        utf8 = codecs.getincrementaldecoder("utf-8-sig")("replace")
        decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        for chunk in self._chunks:
            *blocks, self.rest = (self.rest + decoder.decode(chunk)).split("\n\n")
            yield from filter(None, map(_event, blocks))


def _event(block: str) -> Event | None:
    """Read the lines between two blank ones; None when they carry no data, as a keep-alive comment."""
    name, data = "", []
    for line in block.split("\n"):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
    return Event(name, "\n".join(data)) if data else None
