"""One request of the queue, with its status and that of its webhook."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

COLUMNS = (
    "id, path, model_input, priority, webhook, retry, created_at, expires_s, status, status_at, attempts, data, errors,"
    " webhook_status, webhook_attempts"
)


class Status(StrEnum):
    """The status of a request."""

    QUEUED = "QUEUED"
    IN_PROGRESS = "IN_PROGRESS"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    EXPIRED = "EXPIRED"
    CANCELED = "CANCELED"


class WebhookStatus(StrEnum):
    """The status of a request's webhook."""

    PENDING = "PENDING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"
    NO_WEBHOOK_PROVIDED = "NO_WEBHOOK_PROVIDED"


@dataclass(frozen=True, slots=True)
class Record:
    """One request, as stored in the database."""

    id: str
    path: str
    model_input: Any
    priority: int
    webhook: str | None
    retry: dict[str, int]
    created_at: str
    expires_s: float
    status: Status
    status_at: str
    attempts: int
    data: Any
    errors: list[dict[str, str]]
    webhook_status: WebhookStatus
    webhook_attempts: int


def from_row(row: tuple[Any, ...]) -> Record:
    """Read a row of `COLUMNS`."""
    values = dict(zip((name.strip() for name in COLUMNS.split(",")), row, strict=True))
    for name in ("model_input", "retry", "data", "errors"):
        values[name] = None if values[name] is None else json.loads(values[name])
    return Record(
        **values | {"status": Status(values["status"]), "webhook_status": WebhookStatus(values["webhook_status"])}
    )
