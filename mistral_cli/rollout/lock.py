"""One rollout of a service at a time: a Lease with an owner and an expiry, and beside it the record of the rollout.

The record cannot live on the InferenceService: KServe copies its annotations into the revision template, where a
change is a new revision, that is a model reload on a second GPU.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from mistral_cli.cluster import LEASE, ClusterError, Conflict, Kind, NotFound
from mistral_cli.objects import Object, dig, time_of
from mistral_cli.rollout.record import Record, dump, load, timestamp

DURATION_S = 45
RENEW_EVERY_S = 10
RECORD = "mistral-rollout/record"
HISTORY = "mistral-rollout/history"
HISTORY_LENGTH = 10


class LockHeld(Exception):
    """Another runner has the lock; `str(error)` names it."""


class LockLost(Exception):
    """Another runner has taken the lock, so this one may write nothing more."""


class Leases(Protocol):
    """The operations of a cluster that the lock needs."""

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object: ...
    def create(self, kind: Kind, namespace: str | None, body: Object) -> Object: ...
    def replace(self, kind: Kind, namespace: str, name: str, body: Object) -> Object: ...


def identity() -> str:
    """Return a unique name of this process that people can read."""
    job = os.environ.get("GITHUB_RUN_ID") or f"pid {os.getpid()}"
    user = os.environ.get("GITHUB_ACTOR") or os.environ.get("USER", "unknown")
    return f"{user}@{socket.gethostname()} {job} {uuid.uuid4().hex[:6]}"


class Lock:
    """The Lease `rollout-NAME`. `resourceVersion` decides between two runners that write at once."""

    def __init__(
        self, leases: Leases, namespace: str, service: str, owner: str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:  # fmt: skip
        self._leases, self._namespace, self._owner, self._now = leases, namespace, owner, now
        self._name = f"rollout-{service}"
        self._lease: Object | None = None
        self._mutex = threading.Lock()

    def acquire(self) -> None:
        """Take the lock, or that of a runner that renewed it too long ago.

        Raises:
            LockHeld: another runner has the lock.
        """
        lease = self._read()
        holder = dig(lease, "spec", "holderIdentity")
        if holder and holder != self._owner and self._now() < self._expiry(lease):
            raise LockHeld(
                f"{holder} has the lock of this rollout until {self._expiry(lease):%H:%M:%S} UTC. "
                f"The lock of a killed runner expires by then."
            )
        try:
            self._write(lease, self._owner, {})
        except Conflict as error:
            raise LockHeld(f"Another runner took the lock of this rollout just now: {error}") from error

    def renew(self) -> None:
        """Extend the lock.

        Raises:
            LockLost: another runner has it.
        """
        self._update({})

    def release(self) -> None:
        """Release the lock and keep the record."""
        with self._mutex:
            if self._lease is not None:
                lease, self._lease = self._lease, None
                self._write(lease, None, {})

    @contextmanager
    def renewing(self, lost: Callable[[], None]) -> Iterator[None]:
        """Renew in the background while the block runs; `lost` is called when another runner has taken it."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(RENEW_EVERY_S):
                try:
                    self.renew()
                except LockLost:
                    lost()
                    return
                except ClusterError:
                    continue  # while the API server is away, no other run can take the lock

        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(RENEW_EVERY_S)

    def record(self) -> Record | None:
        """Read the record of the last rollout, or None."""
        return load(dig(self._read(), "metadata", "annotations", RECORD))

    def history(self) -> list[dict[str, Any]]:
        """Return the rollouts that ended, newest last."""
        found: list[dict[str, Any]] = json.loads(dig(self._read(), "metadata", "annotations", HISTORY) or "[]")
        return found

    def write(self, record: Record) -> None:
        """Save the record; one that has ended also goes into the history.

        Raises:
            LockLost: another runner has the lock.
        """
        annotations = {RECORD: dump(record)}
        if not record.unfinished:
            past = [*self.history(), {**asdict(record), "baseline": None}]
            annotations[HISTORY] = json.dumps(past[-HISTORY_LENGTH:], separators=(",", ":"))
        self._update(annotations)

    def _update(self, annotations: dict[str, str]) -> None:
        with self._mutex:
            if self._lease is None:
                return
            try:
                self._write(self._lease, self._owner, annotations)
            except Conflict as error:
                current = self._read()
                if dig(current, "spec", "holderIdentity") != self._owner:
                    raise LockLost(
                        f"Another runner took the lock: {dig(current, 'spec', 'holderIdentity')}."
                    ) from error
                self._write(current, self._owner, annotations)

    def _read(self) -> Object | None:
        try:
            return self._leases.get(LEASE, self._namespace, self._name)
        except NotFound:
            return None

    def _write(self, lease: Object | None, holder: str | None, annotations: dict[str, str]) -> None:
        """Create or replace the Lease; the one read decides which version may be replaced."""
        metadata = {**(dig(lease, "metadata") or {}), "name": self._name, "namespace": self._namespace}
        metadata["annotations"] = {**(metadata.get("annotations") or {}), **annotations}
        metadata.pop("managedFields", None)
        body = {
            "apiVersion": LEASE.group_version,
            "kind": "Lease",
            "metadata": metadata,
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": DURATION_S,
                "acquireTime": dig(lease, "spec", "acquireTime")
                if dig(lease, "spec", "holderIdentity") == holder
                else _micro(self._now()),
                "renewTime": _micro(self._now()),
            },
        }
        if lease is None:
            written = self._leases.create(LEASE, self._namespace, body)
        else:
            written = self._leases.replace(LEASE, self._namespace, self._name, body)
        if holder is not None:
            self._lease = written

    def _expiry(self, lease: Object | None) -> datetime:
        renewed = time_of(dig(lease, "spec", "renewTime")) or datetime.fromtimestamp(0, UTC)
        return renewed + timedelta(seconds=dig(lease, "spec", "leaseDurationSeconds") or DURATION_S)


def _micro(moment: datetime) -> str:
    return timestamp(moment).replace("+00:00", "Z")
