"""Webhooks: which URLs may be called, and the signed call itself (Standard Webhooks)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from urllib.parse import urlsplit

import httpx
from standardwebhooks import Webhook

from mistral_relay.record import Record

TIMEOUT_S = 10.0
MAX_ATTEMPTS = 8
"""With delays that double from 5 s: about 11 minutes in all."""


def refusal(url: str, hosts: Sequence[str]) -> str | None:
    """Return why a URL may not be called, or None.

    Only https on port 443 to a listed host name; never an address, so that no caller reaches into the cluster.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return "webhook_endpoint is not a URL."
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url or len(url) > 2048:
        return "webhook_endpoint is not a URL."
    if parts.scheme != "https":
        return "webhook_endpoint must be an https URL."
    if parts.username is not None or parts.password is not None or port not in (None, 443):
        return "webhook_endpoint must not have a user name, a password or a port."
    if host not in hosts:
        return "webhook_endpoint: the relay is not configured to call this host."
    return None


class Sender:
    """Signs and sends webhooks. Redirects are not followed: their target was not checked."""

    def __init__(self, http: httpx.AsyncClient, secret: str) -> None:
        self._http = http
        self._webhook = Webhook(secret)

    async def send(self, record: Record) -> str | None:
        """Call a request's webhook; return why that failed, or None. The `webhook-id` is the request's id."""
        assert record.webhook is not None
        body = json.dumps(payload(record))
        now = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "webhook-id": record.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._webhook.sign(record.id, now, body),
        }
        try:
            response = await self._http.post(
                record.webhook, content=body, headers=headers, timeout=TIMEOUT_S, follow_redirects=False
            )
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        return None if response.is_success else f"status {response.status_code}"


def payload(record: Record) -> dict[str, object]:
    """Return the body of a webhook, in the hosted service's form."""
    return {
        "request_id": record.id,
        "type": "async_request_completed",
        "time": record.status_at,
        "data": record.data,
        "errors": record.errors,
    }


def delay_s(attempt: int) -> float:
    """Return the pause after so many failed attempts, in seconds."""
    return min(600.0, 5.0 * 2 ** (attempt - 1))
