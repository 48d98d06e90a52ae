"""Prompt and completion as one text, in the pieces in which Transformers' `TextStreamer` prints them.

The joined pieces are what `TextIteratorStreamer(tokenizer)` yields, byte for byte, peculiarities included: each line is
decoded by itself, so that a decoder that strips a leading space strips it from every line. A token costs the same
however long the line is, because nothing is decoded twice. Knows no tokenizer.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence

REPLACEMENT = "\ufffd"
Piece = Callable[[int], str | bytes | None]
"""What a token adds to a text, special tokens included: text, bytes that need their neighbours, None if skipped."""

CJK = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
"""Unicode blocks whose characters are printed at once; other text is printed up to its last space."""


class FullTextDetokenizer:
    """One sequence's text, prompt included (`request.Detokenizer`).

    Unlike `IncrementalDetokenizer` it does not cut the text at a stop string: `generate` returns the stop string too.
    """

    def __init__(
        self,
        piece: Piece,
        prompt_ids: Sequence[int],
        stop: tuple[str, ...] = (),
        *,
        byte_runs: bool,
        strip_start: int,
        with_prompt: bool,
    ) -> None:
        self.stopped = False
        self.ids: list[int] = []
        """The completion's tokens."""
        self._piece = piece
        self._new_line = lambda: _Line(byte_runs=byte_runs, strip_start=strip_start)
        self._line = self._new_line()
        self._num_printed = 0
        """Characters of the line that have been returned."""
        self._stops = stop
        self._longest_stop = max(map(len, stop), default=0)
        self.prompt = self._put(prompt_ids)
        """What is certain of the prompt's text; '' without the prompt."""
        if not with_prompt:
            self.prompt = ""
            self._num_printed = len(self._line.text)
        self._completion_start = len(self._line.text)
        """Where the completion begins in the line."""
        self._earlier = ""
        """The end of the completion's earlier lines, as far as a stop string can reach back."""
        self._num_searched = 0

    def push(self, token_id: int) -> str:
        """Return the text that has become certain with this token, often ''."""
        self.ids.append(token_id)
        return self._put([token_id])

    def flush(self) -> str:
        """Return what is left at the end."""
        text = self._line.text[self._num_printed :]
        self._line, self._num_printed = self._new_line(), 0
        return text

    def _put(self, token_ids: Iterable[int]) -> str:
        for token_id in token_ids:
            piece = self._piece(token_id)
            if piece is not None:
                self._line.push(piece)
        text = self._line.text
        if self.ids and self._stops:
            self._search(text)
        if text.endswith("\n"):
            printed = text[self._num_printed :]
            self._line, self._num_printed = self._new_line(), 0
            return printed
        end = len(text) if text and _is_cjk(text[-1]) else text.rfind(" ") + 1
        printed = text[self._num_printed : end]
        self._num_printed += len(printed)
        return printed

    def _search(self, line: str) -> None:
        """Look for the stop strings in the completion's new text."""
        text = self._earlier + line[self._completion_start :]
        start = max(0, self._num_searched - self._longest_stop)
        self.stopped = self.stopped or any(text.find(stop, start) >= 0 for stop in self._stops)
        self._num_searched = len(text)
        if line.endswith("\n"):
            self._earlier = text[-self._longest_stop :]
            self._completion_start, self._num_searched = 0, len(self._earlier)


class _Line:
    """The text of some tokens as `decode` gives it, bytes that are not yet a character included."""

    def __init__(self, *, byte_runs: bool, strip_start: int) -> None:
        self._byte_runs = byte_runs
        self._strip_start = strip_start
        self._settled = ""
        self._run = b""
        """Byte-fallback tokens since the last other token: text if all of them together are UTF-8."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str | bytes) -> None:
        if isinstance(piece, str):
            self._settled += self._unsettled() + piece
            self._run = b""
            self._utf8.reset()
        elif self._byte_runs:
            self._run += piece
        else:
            self._settled += self._utf8.decode(piece)

    @property
    def text(self) -> str:
        text = self._settled + self._unsettled()
        start = 0
        while start < self._strip_start and text.startswith(" ", start):
            start += 1
        return text[start:]

    def _unsettled(self) -> str:
        if not self._byte_runs:
            return self._utf8.getstate()[0].decode("utf-8", "replace")
        try:
            return self._run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(self._run)


def _is_cjk(char: str) -> bool:
    return any(low <= ord(char) <= high for low, high in CJK)
