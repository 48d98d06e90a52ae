"""The command's output: stdout gets the answer and nothing else, stderr gets messages. Both are plain text in a pipe.

A model's text is not trusted with a terminal: control characters, which could move the cursor, retitle the
window or answer as if typed, are dropped there. A pipe gets the text as it is.
"""

from __future__ import annotations

import io
import sys
import time
from typing import Any, cast

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)])
del CONTROLS[ord("\n")], CONTROLS[ord("\t")]


class Terminal:
    """A context manager: leaving it removes the spinner."""

    def __init__(self) -> None:
        # Half a surrogate pair, which UTF-8 cannot encode, must not end the program.
        cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="replace")
        self.live = sys.stdout.isatty()
        """Stdout is a terminal."""
        self._stderr = Console(stderr=True, highlight=False, soft_wrap=True)
        self._spinner = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
            console=self._stderr, transient=True, disable=not self._stderr.is_terminal,
        )  # fmt: skip
        self._task = self._spinner.add_task("Waiting for the model")
        self._notice = self._last = ""
        self._begun_s = self._first_s = 0.0

    def __enter__(self) -> Terminal:
        self._begun_s = time.monotonic()
        self._spinner.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._spinner.stop()
        if self._last and not self._last.endswith("\n"):
            self.write("\n")

    def notice(self, reason: str) -> None:
        """Show the reason for a wait: beside the spinner, or as one line each time the reason changes."""
        reason = reason.translate(CONTROLS)
        self._spinner.update(self._task, description=Text(reason).markup)
        if not self._stderr.is_terminal and reason != self._notice:
            self._stderr.print(f"Waiting: {reason}", markup=False)
        self._notice = reason

    def write(self, text: str) -> None:
        """Write a part of the answer to stdout and flush it."""
        if not text:
            return
        self._spinner.stop()
        self._first_s = self._first_s or time.monotonic()
        self._last = text
        sys.stdout.write(text.translate(CONTROLS) if self.live else text)
        sys.stdout.flush()

    def summary(self, final: Any) -> None:
        """Print token count and speed below a stream, on a terminal."""
        if not (self.live and self._stderr.is_terminal and isinstance(final, dict) and "completion_tokens" in final):
            return
        first_s, end_s = self._first_s or time.monotonic(), time.monotonic()
        facts = [f"{final['completion_tokens']} tokens", f"first after {first_s - self._begun_s:.1f} s"]
        if final["completion_tokens"] > 1 and end_s > first_s:
            facts.append(f"then {(final['completion_tokens'] - 1) / (end_s - first_s):.1f}/s")
        if final.get("finish_reason") == "length":
            facts.append("ended by the length limit")
        self._stderr.print(" · ".join(facts), style="dim", markup=False)

    def fail(self, sentence: str) -> None:
        """Print the error in one line."""
        self._stderr.print(Text("Error: ", style="bold red") + Text(sentence.translate(CONTROLS)))
