"""The work behind the queue: sends requests to the model, delivers webhooks, expires and forgets.

A call wakes an InferenceService that has scaled to zero and is held until a pod is ready. A refusal for now (429, 503,
no connection) is not an attempt: the request waits in the queue, until it expires.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import anyio.abc
import httpx

from mistral_relay import webhooks
from mistral_relay.record import Record, Status, WebhookStatus
from mistral_relay.store import Store

log = logging.getLogger(__name__)

POLL_S = 0.25
TICK_S = 5.0
"""How often the clock is written to disk; a crash sets it back by at most this time."""
RETRY_LATER_S = 5.0
"""Delay after a refusal without `Retry-After`."""
NOT_NOW = frozenset({408, 425, 429, 502, 503})


class Worker:
    """Sends the requests of the store; call `wake` after adding one."""

    def __init__(
        self,
        store: Store,
        http: httpx.AsyncClient,
        sender: webhooks.Sender | None,
        *,
        upstream_url: str,
        concurrency: int,
        timeout_s: float,
        retention_s: float,
    ) -> None:
        self._store, self._http, self._sender = store, http, sender
        self._upstream_url, self._timeout_s, self._retention_s = upstream_url, timeout_s, retention_s
        self._room = anyio.Semaphore(concurrency)
        self._added = anyio.Event()
        self._sending: set[str] = set()

    def wake(self) -> None:
        """Read the queue now."""
        self._added.set()

    async def run(self) -> None:
        """Send requests and webhooks until cancelled."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._keep_house)
            while True:
                try:
                    await self._dispatch(group)
                except sqlite3.Error:  # a full disk: queued requests stay queued
                    log.exception("the database cannot be used; trying again")
                    await anyio.sleep(RETRY_LATER_S)

    async def _dispatch(self, group: anyio.abc.TaskGroup) -> None:
        await self._room.acquire()
        try:
            record = await anyio.to_thread.run_sync(self._store.claim)
        except BaseException:
            self._room.release()
            raise
        if record is not None:
            group.start_soon(self._process, record)
            return
        self._room.release()
        with anyio.move_on_after(POLL_S):
            await self._added.wait()
        self._added = anyio.Event()

    async def _process(self, record: Record) -> None:
        try:
            await self._call(record)
        except sqlite3.Error:  # it stays IN_PROGRESS until the next start, which queues it again
            log.exception("request %s: its end cannot be stored", record.id)
        finally:
            self._room.release()

    async def _call(self, record: Record) -> None:
        path = record.path.removesuffix("async_predict") + "predict"
        try:
            response = await self._http.post(
                self._upstream_url + path, json=record.model_input, headers={"x-request-id": record.id},
                timeout=httpx.Timeout(self._timeout_s, connect=30.0),
            )  # fmt: skip
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            log.info("request %s waits: %s", record.id, type(error).__name__)
            await self._do(self._store.requeue, record.id, RETRY_LATER_S, counts=False)
            return
        except httpx.HTTPError as error:
            await self._failed(record, {"code": "broken_connection", "message": f"{type(error).__name__}: {error}"})
            return
        if response.status_code in NOT_NOW:
            await self._do(self._store.requeue, record.id, _retry_after_s(response), counts=False)
        elif response.is_success:
            await self._answered(record, response)
        elif response.is_server_error:
            await self._failed(record, _error(response))
        else:
            await self._finish(record, Status.FAILED, error=_error(response))

    async def _answered(self, record: Record, response: httpx.Response) -> None:
        try:
            data = response.json()
        except ValueError:  # a proxy that ends can leave status 200 and no body, or half of it
            message = f"the answer with status {response.status_code} is not JSON"
            await self._failed(record, {"code": "broken_answer", "message": message})
        else:
            await self._finish(record, Status.SUCCEEDED, data=data)

    async def _failed(self, record: Record, error: dict[str, str]) -> None:
        """Try again as the request's `inference_retry_config` says, or give up."""
        if record.attempts >= record.retry["max_attempts"]:
            await self._finish(record, Status.FAILED, error=error)
            return
        delay_ms = min(record.retry["initial_delay_ms"] * 2 ** (record.attempts - 1), record.retry["max_delay_ms"])
        await self._do(self._store.requeue, record.id, delay_ms / 1000, counts=True)

    async def _finish(
        self, record: Record, status: Status, data: Any = None, error: dict[str, str] | None = None
    ) -> None:
        await self._do(self._store.finish, record.id, status, data, error)
        log.info("request %s: %s", record.id, status)

    async def _do(self, change: Callable[..., None], *args: Any, **named: Any) -> None:
        """Run a change of the store in a thread, shielded: an answer that has come must be stored."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(partial(change, *args, **named))

    async def _keep_house(self) -> None:
        """Expire requests, deliver webhooks and delete old requests, four times a second; store the clock regularly."""
        noted_s = self._store.now_s
        async with anyio.create_task_group() as group:
            while True:
                try:
                    if self._store.now_s - noted_s >= TICK_S:
                        await anyio.to_thread.run_sync(self._store.tick)
                        noted_s = self._store.now_s
                    await anyio.to_thread.run_sync(self._store.expire)
                    await anyio.to_thread.run_sync(self._store.forget, self._retention_s)
                    for record in await anyio.to_thread.run_sync(self._store.due_webhooks, 32):
                        if record.id not in self._sending:
                            self._sending.add(record.id)
                            group.start_soon(self._deliver, record)
                except sqlite3.Error:
                    log.exception("the database cannot be used; trying again")
                await anyio.sleep(POLL_S)

    async def _deliver(self, record: Record) -> None:
        try:
            if self._sender is None:  # webhooks were turned off after it was accepted
                reason: str | None = "the relay has no webhook secret"
            else:
                reason = await self._sender.send(record)
            attempt = record.webhook_attempts + 1
            if reason is None:
                status, delay = WebhookStatus.SUCCEEDED, 0.0
            elif attempt < webhooks.MAX_ATTEMPTS:
                status, delay = WebhookStatus.PENDING, webhooks.delay_s(attempt)
            else:
                status, delay = WebhookStatus.FAILED, 0.0
            if reason is not None:
                log.warning("request %s: webhook attempt %d failed: %s", record.id, attempt, reason)
            await anyio.to_thread.run_sync(self._store.note_webhook, record.id, status, delay)
        except sqlite3.Error:
            log.exception("request %s: its webhook's status cannot be stored", record.id)
        finally:
            self._sending.discard(record.id)


def _content(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text


def _error(response: httpx.Response) -> dict[str, str]:
    content = _content(response)
    if isinstance(content, dict) and isinstance(content.get("error"), str):
        return {"code": str(content.get("code", response.status_code)), "message": content["error"]}
    text = content if isinstance(content, str) else json.dumps(content)
    return {"code": str(response.status_code), "message": text[:1000]}


def _retry_after_s(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return min(float(value), 600.0) if value.isdecimal() else RETRY_LATER_S
