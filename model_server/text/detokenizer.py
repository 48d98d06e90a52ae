"""An answer's text in increments: characters made whole, the answer ended at a stop string.

The rule: the increments joined are what `tokenizer.decode(ids, skip_special_tokens=True)` makes of the whole
answer, byte for byte, except that a space which the decoder strips from the start of a text is kept, so that
prompt and answer read right side by side. An increment never holds half a character. Each token costs the
same however long the answer is: what it adds is looked up (`Text.piece`), and nothing is decoded twice. Knows
no tokenizer.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable

REPLACEMENT = "\ufffd"
Piece = Callable[[int], str | bytes | None]
"""What a token adds to an answer: text, bytes that need their neighbours, or None if it is skipped."""


class IncrementalDetokenizer:
    """One answer's text as its tokens come (`request.Detokenizer`).

    Text is held back only while it could still change: a character whose bytes are not all there, a run of
    byte-fallback tokens (one bad byte makes all of it unreadable), the possible beginning of a stop string.
    """

    def __init__(self, piece: Piece, stop: tuple[str, ...] = (), *, byte_runs: bool = False) -> None:
        self.stopped = False
        self._piece = piece
        self._decoder = _ByteRuns() if byte_runs else _Bytes()
        self._stops = [_StopString(s) for s in stop if s]
        self._held = ""

    def push(self, token_id: int) -> str:
        """Return the text that has become certain with this token, often ''."""
        piece = None if self.stopped else self._piece(token_id)
        return "" if piece is None else self._release(self._decoder.push(piece))

    def flush(self) -> str:
        """Return what is left at the end."""
        text = "" if self.stopped else self._release(self._decoder.flush())
        held, self._held = self._held, ""
        return text + held

    def _release(self, new: str) -> str:
        """Return what no stop string can claim any more, up to the first one that is complete."""
        if not self._stops or not new:
            return new
        text = self._held + new
        starts = [len(self._held) + end - len(stop) for stop in self._stops if (end := stop.advance(new)) is not None]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        certain = len(text) - max(stop.matched for stop in self._stops)
        self._held = text[certain:]
        return text[:certain]


class _Bytes:
    """Bytes read as UTF-8 as they come; what can never become a character is U+FFFD at once."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str | bytes) -> str:
        return piece if isinstance(piece, str) else self._utf8.decode(piece)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ByteRuns:
    """Byte fallback: a run of byte tokens is text if all of it is UTF-8, else each of its bytes is U+FFFD."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._num_bytes = 0
        self._broken = False

    def push(self, piece: str | bytes) -> str:
        if isinstance(piece, str):
            return self.flush() + piece
        if self._broken:
            return REPLACEMENT
        self._num_bytes += 1
        try:
            self._text += self._utf8.decode(piece)
        except UnicodeDecodeError:  # nothing that follows can mend it, so nothing need be held
            self._broken = True
            return REPLACEMENT * self._num_bytes
        return ""

    def flush(self) -> str:
        """End the run."""
        if not self._num_bytes:
            return ""
        unfinished = bool(self._utf8.getstate()[0])
        text = REPLACEMENT * self._num_bytes if unfinished else self._text
        text = "" if self._broken else text
        self._begin()
        return text


class _StopString:
    """How much of one stop string the text ends with (Knuth, Morris and Pratt).

    Work grows with the text alone: the table of borders grows with the match, so that a stop string of a
    megabyte costs nothing until the text resembles it.
    """

    def __init__(self, string: str) -> None:
        self.matched = 0
        """Characters at the end of the text that could be the beginning of the stop string."""
        self._string = string
        self._borders: list[int] = []

    def __len__(self) -> int:
        return len(self._string)

    def advance(self, text: str) -> int | None:
        """Read on; return where in `text` the stop string first ends, or None."""
        for i, char in enumerate(text):
            self.matched = self._longer(self.matched, char)
            if self.matched > len(self._borders):
                self._borders.append(self._longer(self._borders[-1], char) if self._borders else 0)
            if self.matched == len(self._string):
                return i + 1
        return None

    def _longer(self, matched: int, char: str) -> int:
        """Return the longest match after one more character, given the one before it."""
        while matched and self._string[matched] != char:
            matched = self._borders[matched - 1]
        return matched + 1 if self._string[matched] == char else 0
