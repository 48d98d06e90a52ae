"""The queue in SQLite: each state change is one transaction, on disk before it is acted on.

    QUEUED -> IN_PROGRESS -> SUCCEEDED | FAILED          QUEUED -> EXPIRED | CANCELED
    webhook: PENDING -> SUCCEEDED | FAILED               or NO_WEBHOOK_PROVIDED, CANCELED

A process that is killed leaves requests IN_PROGRESS; the next one queues them again under the same id. The queue has a
clock of its own, in seconds, which runs only while the relay does: a jump of the system's clock neither expires a
request nor delays one.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mistral_relay.record import COLUMNS, Record, Status, WebhookStatus, from_row


class QueueFull(Exception):
    """The maximum number of requests is waiting."""


class KeyReused(Exception):
    """An Idempotency-Key was used for another request."""


_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
  id TEXT PRIMARY KEY, idempotency_key TEXT UNIQUE, path TEXT NOT NULL, model_input TEXT NOT NULL,
  priority INTEGER NOT NULL, webhook TEXT, retry TEXT NOT NULL, created_at TEXT NOT NULL, expires_s REAL NOT NULL,
  status TEXT NOT NULL, status_at TEXT NOT NULL, due_s REAL NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
  data TEXT, errors TEXT NOT NULL DEFAULT '[]', finished_s REAL,
  webhook_status TEXT NOT NULL, webhook_attempts INTEGER NOT NULL DEFAULT 0, webhook_due_s REAL
);
CREATE INDEX IF NOT EXISTS queue ON requests (status, priority, created_at);
CREATE INDEX IF NOT EXISTS webhooks ON requests (webhook_status, webhook_due_s);
CREATE TABLE IF NOT EXISTS clock (elapsed_s REAL NOT NULL);
"""


class Store:
    """The queue of one relay. Thread-safe."""

    def __init__(self, path: Path, *, max_queue_size: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Open the database; requests that a killed process was working on are queued again."""
        self._max_queue_size = max_queue_size
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self._db.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; {_SCHEMA}")
        row = self._db.execute("SELECT elapsed_s FROM clock").fetchone()
        if row is None:
            self._db.execute("INSERT INTO clock VALUES (0)")
        self._monotonic = monotonic
        self._start_s = monotonic() - (row[0] if row else 0.0)
        with self._transaction() as db:
            db.execute("UPDATE requests SET status='QUEUED', due_s=0 WHERE status='IN_PROGRESS'")

    def close(self) -> None:
        """Note the clock and close the database."""
        self.tick()
        self._db.close()

    @property
    def now_s(self) -> float:
        """Seconds of the queue's own clock."""
        return self._monotonic() - self._start_s

    def tick(self) -> None:
        """Write the clock to disk; called every few seconds."""
        with self._transaction() as db:
            db.execute("UPDATE clock SET elapsed_s = ?", (self.now_s,))

    def add(
        self,
        path: str,
        model_input: Any,
        *,
        priority: int,
        max_time_in_queue_s: float,
        webhook: str | None,
        retry: dict[str, int],
        idempotency_key: str | None = None,
    ) -> str:
        """Accept a request and return its id; the same Idempotency-Key returns the id that it got before.

        Raises:
            QueueFull: too many wait.
            KeyReused: the key came with another path or input before.
            sqlite3.OperationalError: the disk is full; nothing is accepted.
        """
        text = json.dumps(model_input)
        with self._transaction() as db:
            if idempotency_key is not None:
                known = db.execute(
                    "SELECT id, path, model_input FROM requests WHERE idempotency_key=?", (idempotency_key,)
                ).fetchone()
                if known is not None:
                    if known[1:] != (path, text):
                        raise KeyReused
                    return str(known[0])
            (waiting,) = db.execute("SELECT count(*) FROM requests WHERE status='QUEUED'").fetchone()
            if waiting >= self._max_queue_size:
                raise QueueFull
            request_id, now = uuid.uuid4().hex, _timestamp()
            db.execute(
                "INSERT INTO requests (id, idempotency_key, path, model_input, priority, webhook, retry, created_at,"
                " expires_s, status, status_at, due_s, webhook_status) VALUES (?,?,?,?,?,?,?,?,?,'QUEUED',?,0,?)",
                (
                    request_id, idempotency_key, path, text, priority, webhook, json.dumps(retry), now,
                    self.now_s + max_time_in_queue_s, now,
                    WebhookStatus.NO_WEBHOOK_PROVIDED if webhook is None else WebhookStatus.PENDING,
                ),
            )  # fmt: skip
        return request_id

    def get(self, request_id: str) -> Record | None:
        """Return a request, or None when there is none or its retention has passed."""
        with self._lock:
            row = self._db.execute(f"SELECT {COLUMNS} FROM requests WHERE id=?", (request_id,)).fetchone()
        return row and from_row(row)

    def cancel(self, request_id: str) -> bool:
        """Cancel a request that waits; return whether it did."""
        with self._transaction() as db:
            cursor = db.execute(
                "UPDATE requests SET status='CANCELED', status_at=?, finished_s=?, webhook_status=CASE webhook_status"
                " WHEN 'PENDING' THEN 'CANCELED' ELSE webhook_status END WHERE id=? AND status='QUEUED'",
                (_timestamp(), self.now_s, request_id),
            )
        return cursor.rowcount == 1

    def claim(self) -> Record | None:
        """Take the next request that is due: lowest priority number first, then the oldest."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT id FROM requests WHERE status='QUEUED' AND due_s<=? AND expires_s>?"
                " ORDER BY priority, created_at, rowid LIMIT 1",
                (self.now_s, self.now_s),
            ).fetchone()
            if row is None:
                return None
            db.execute(
                "UPDATE requests SET status='IN_PROGRESS', status_at=?, attempts=attempts+1 WHERE id=?",
                (_timestamp(), row[0]),
            )
            return from_row(db.execute(f"SELECT {COLUMNS} FROM requests WHERE id=?", row).fetchone())

    def requeue(self, request_id: str, delay_s: float, *, counts: bool) -> None:
        """Queue a request again; `counts` says whether the attempt was one."""
        with self._transaction() as db:
            db.execute(
                "UPDATE requests SET status='QUEUED', status_at=?, due_s=?, attempts=attempts-? WHERE id=?",
                (_timestamp(), self.now_s + delay_s, 0 if counts else 1, request_id),
            )

    def finish(self, request_id: str, status: Status, data: Any = None, error: dict[str, str] | None = None) -> None:
        """Store how a request ended; its webhook is due now."""
        with self._transaction() as db:
            db.execute(
                "UPDATE requests SET status=?, status_at=?, finished_s=?, data=?, errors=?, webhook_due_s=? WHERE id=?",
                (
                    status, _timestamp(), self.now_s, json.dumps(data), json.dumps([error] if error else []),
                    self.now_s, request_id,
                ),
            )  # fmt: skip

    def expire(self) -> int:
        """Expire requests that have waited too long; return their number."""
        error = json.dumps(
            [{"code": "expired", "message": "The request waited longer than max_time_in_queue_seconds."}]
        )
        with self._transaction() as db:
            return db.execute(
                "UPDATE requests SET status='EXPIRED', status_at=?, finished_s=?, errors=?, webhook_due_s=?"
                " WHERE status='QUEUED' AND expires_s<=?",
                (_timestamp(), self.now_s, error, self.now_s, self.now_s),
            ).rowcount

    def due_webhooks(self, limit: int) -> list[Record]:
        """Return finished requests whose webhook is to be tried now."""
        with self._lock:
            rows = self._db.execute(
                f"SELECT {COLUMNS} FROM requests WHERE webhook_status='PENDING' AND webhook_due_s<=? LIMIT ?",
                (self.now_s, limit),
            ).fetchall()
        return [from_row(row) for row in rows]

    def note_webhook(self, request_id: str, status: WebhookStatus, delay_s: float = 0.0) -> None:
        """Store how an attempt at a webhook ended; PENDING tries again after the delay."""
        with self._transaction() as db:
            db.execute(
                "UPDATE requests SET webhook_status=?, webhook_attempts=webhook_attempts+1, webhook_due_s=? WHERE id=?",
                (status, self.now_s + delay_s, request_id),
            )

    def forget(self, retention_s: float) -> None:
        """Delete requests that ended long ago and whose webhook is not pending."""
        with self._transaction() as db:
            db.execute(
                "DELETE FROM requests WHERE finished_s<? AND webhook_status<>'PENDING'", (self.now_s - retention_s,)
            )

    def counts(self) -> dict[str, int]:
        """Return how many requests have each status."""
        with self._lock:
            return dict(self._db.execute("SELECT status, count(*) FROM requests GROUP BY status").fetchall())

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


def _timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
