"""The output: one line for each request, in a file of answers or a file of errors, and which ids they hold.

The two files are the only record. A line is appended whole; a run that was killed leaves at most one torn line, which
the next run cuts off. The ids stand in a SQLite file beside the output, rebuilt at each start and removed at the end:
memory stays constant for any number of lines.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from mistral_cli.exit_codes import Misused, Refused


class Results:
    """The files of one batch. A context manager; one process at a time."""

    def __init__(self, output: Path, errors: Path) -> None:
        """Open both files, repair a torn last line and read the ids that they hold.

        Raises:
            Misused: a file cannot be written, is in use by another run, or holds something else.
        """
        self.num_done = 0
        """Results found from earlier runs."""
        self.num_errors = 0
        """Error lines written by this run."""
        self._index_path = output.with_name(output.name + ".index")
        self._files = contextlib.ExitStack()
        try:
            self._output, self._errors = self._open(output), self._open(errors)
            self._index = self._files.enter_context(contextlib.closing(self._make_index()))
            for path, file in ((output, self._output), (errors, self._errors)):
                self._read_ids(path, file)
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._output, self._errors):
            os.fsync(file.fileno())
        self._index_path.unlink(missing_ok=True)
        self._files.close()

    def is_done(self, custom_id: str) -> bool:
        """Return whether an earlier run has written this id's result."""
        return self._index.execute("SELECT 1 FROM done WHERE id = ?", (custom_id,)).fetchone() is not None

    def is_new(self, custom_id: str) -> bool:
        """Return whether this run meets the id for the first time, and note it."""
        return self._index.execute("INSERT OR IGNORE INTO seen VALUES (?)", (custom_id,)).rowcount == 1

    def write_answer(self, custom_id: str, status: int, request_id: str | None, body: Any) -> None:
        """Append a result; statuses from 400 go to the file of errors."""
        response = {"status_code": status, "request_id": request_id, "body": body}
        self._append(self._output if status < 400 else self._errors, custom_id, response, None)

    def write_error(self, custom_id: str | None, code: str, message: str) -> None:
        """Append an error that no response describes."""
        self._append(self._errors, custom_id, None, {"code": code, "message": message})

    def _append(self, file: BinaryIO, custom_id: str | None, response: Any, error: Any) -> None:
        line = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
        self.num_errors += file is self._errors
        try:
            file.write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")
            file.flush()
        except OSError as reason:
            raise Refused(
                f"A result cannot be written: {reason.strerror}. Run the command again to continue."
            ) from reason

    def _open(self, path: Path) -> BinaryIO:
        try:
            file = self._files.enter_context(path.open("a+b"))
        except OSError as error:
            raise Misused(f"{path} cannot be written: {error.strerror}.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Misused(f"{path} is in use by another `mistral batch`.") from error
        return file

    def _make_index(self) -> sqlite3.Connection:
        self._index_path.unlink(missing_ok=True)
        index = sqlite3.connect(self._index_path, isolation_level=None)
        index.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;"
            "CREATE TABLE done (id TEXT PRIMARY KEY) WITHOUT ROWID;"
            "CREATE TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID;"
        )
        return index

    def _read_ids(self, path: Path, file: BinaryIO) -> None:
        file.seek(0)
        good = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                custom_id = json.loads(line)["custom_id"]
            except (ValueError, KeyError, TypeError) as error:
                raise Misused(
                    f"{path}, line {number}, is not a result of `mistral batch`: name another file."
                ) from error
            good += len(line)
            if custom_id is not None:
                self.num_done += self._index.execute("INSERT OR IGNORE INTO done VALUES (?)", (custom_id,)).rowcount
        file.truncate(good)
