"""Incremental detokenization: text while tokens arrive, in whole characters, up to a stop string.

The pieces joined equal `tokenizer.decode(ids, skip_special_tokens=True)` of the whole answer, byte for byte, with one
exception: a leading space that the decoder would strip is kept, so that prompt and answer can be concatenated. The cost
of a token does not grow with the answer: its text is looked up (`Text.piece`), and nothing is decoded twice. Knows no
tokenizer.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable

REPLACEMENT = "\ufffd"
Piece = Callable[[int], str | bytes | None]
"""The text of a token: a string, bytes that may be part of a character, or None if the token is skipped."""


class IncrementalDetokenizer:
    """The text of one answer (`request.Detokenizer`).

    Text is held back only while it may still change: an incomplete character, a run of byte-fallback tokens (one bad
    byte makes the whole run unreadable), the possible beginning of a stop string.
    """

    def __init__(self, piece: Piece, stop: tuple[str, ...] = (), *, byte_runs: bool = False) -> None:
        self.stopped = False
        self._piece = piece
        self._decoder = _ByteRuns() if byte_runs else _Bytes()
        self._stops = [_StopString(s) for s in stop if s]
        self._held = ""

    def push(self, token_id: int) -> str:
        """Return the text that this token completes, often ''."""
        piece = None if self.stopped else self._piece(token_id)
        return "" if piece is None else self._release(self._decoder.push(piece))

    def flush(self) -> str:
        """Return the text that was held back, at the end of the answer."""
        text = "" if self.stopped else self._release(self._decoder.flush())
        held, self._held = self._held, ""
        return text + held

    def _release(self, new: str) -> str:
        """Return the text that cannot be part of a stop string, up to the first complete stop string."""
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
    """Decodes bytes as UTF-8 incrementally; bytes that cannot become a character are U+FFFD at once."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str | bytes) -> str:
        return piece if isinstance(piece, str) else self._utf8.decode(piece)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ByteRuns:
    """Byte fallback: a run of byte tokens is text if the whole run is UTF-8, else each of its bytes is U+FFFD."""

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
        except UnicodeDecodeError:  # no later byte can repair it
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
    """Matches one stop string at the end of the text (Knuth, Morris and Pratt).

    The table of borders grows with the match: a stop string of a megabyte costs nothing until the text resembles it.
    """

    def __init__(self, string: str) -> None:
        self.matched = 0
        """Length of the text's longest suffix that is a prefix of the stop string."""
        self._string = string
        self._borders: list[int] = []

    def __len__(self) -> int:
        return len(self._string)

    def advance(self, text: str) -> int | None:
        """Read more text; return where in `text` the stop string first ends, or None."""
        for i, char in enumerate(text):
            self.matched = self._longer(self.matched, char)
            if self.matched > len(self._borders):
                self._borders.append(self._longer(self._borders[-1], char) if self._borders else 0)
            if self.matched == len(self._string):
                return i + 1
        return None

    def _longer(self, matched: int, char: str) -> int:
        """Return the length of the longest match after one more character."""
        while matched and self._string[matched] != char:
            matched = self._borders[matched - 1]
        return matched + 1 if self._string[matched] == char else 0
