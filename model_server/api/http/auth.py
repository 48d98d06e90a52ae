"""API keys: a file of them, and the middleware that refuses a request without one, or with too many others of its key.

The file is read again when it changes. A key has a name for the log and the metrics. `routes.py` names the paths that
need no key; `middleware.py` writes the 401.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from model_server.caller import caller
from model_server.errors import KeyBusy, StartupError, Unauthorized
from model_server.telemetry import metrics

log = logging.getLogger(__name__)

SCHEMES = ("bearer", "api-key")
CHALLENGE = 'Bearer realm="model", Api-Key realm="model"'
"""The `WWW-Authenticate` of a refusal. A browser knows neither scheme: it shows the body and asks for no password."""
SENDABLE = re.compile(rb"[\x21-\x7e]+")
"""Characters that a header carries unchanged: visible ASCII without spaces."""
NAMED = re.compile(rb"([A-Za-z0-9._-]{1,64}):[ \t]+([\x21-\x7e]+)")
"""A line `name: key`. The space is required, because a key may contain a colon."""
DEFAULT_NAME = "default"
"""The name of the keys on a line without a name."""


class ApiKeys:
    """The keys of a file, one a line, alone or as `name: key`; empty lines and lines that begin with `#` do not count.

    Several keys may have one name, such as the old and the new key during a rotation.

    The file is checked with every request, so that a rotated Secret counts at once. If it is missing or invalid, the
    last valid keys stay, and the log says so once.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._complaint: str | None = None
        try:
            self._signature = self._stat()
            self._names = self._read()
        except (OSError, ValueError) as error:
            raise StartupError(f"--api_key_file: {_reason(file, error)}.") from None

    def name_of(self, key: bytes) -> str | None:
        """Return a key's name, or None for an unknown key.

        How long it takes depends neither on which key it is nor on how alike they are.
        """
        self._refresh()
        digest = _digest(key)
        names = [name for ours, name in self._names.items() if hmac.compare_digest(digest, ours)]  # compares all
        return names[0] if names else None

    def _refresh(self) -> None:
        try:
            signature = self._stat()
            if signature == self._signature:
                return
            self._names = self._read()
        except (OSError, ValueError) as error:
            complaint = _reason(self._file, error)
            if complaint != self._complaint:
                log.error("%s: the keys read before stay valid", complaint)
            self._complaint = complaint
            return
        self._signature, self._complaint = signature, None
        log.info("read %d keys from %s", len(self._names), self._file)

    def _stat(self) -> tuple[int, ...]:
        # Follows links: Kubernetes rotates a Secret by changing a symbolic link.
        found = self._file.stat()
        return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size

    def _read(self) -> dict[bytes, str]:
        """Return the name of each key, by the key's digest."""
        names: dict[bytes, str] = {}
        for number, line in enumerate(self._file.read_bytes().splitlines(), start=1):
            line = line.strip()
            if not line or line.startswith(b"#"):
                continue
            named = NAMED.fullmatch(line)
            name, key = (named[1].decode(), named[2]) if named else (DEFAULT_NAME, line)
            if not SENDABLE.fullmatch(key):
                raise ValueError(
                    f"line {number} of {self._file} must be a key or `name: key`; a key is ASCII without a space, "
                    "a name is 1 to 64 letters, digits, dots, dashes and underscores"
                )
            if names.setdefault(_digest(key), name) != name:
                raise ValueError(f"line {number} of {self._file} gives a key of another line a second name")
        if not names:
            raise ValueError(f"{self._file} holds no key")
        return names


def _digest(key: bytes) -> bytes:
    """Return a digest of fixed length, so that the comparison does not leak the length of a key."""
    return hashlib.sha256(key).digest()


def _reason(file: Path, error: Exception) -> str:
    return f"{file} cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)


class ApiKeyMiddleware:
    """Refuses every request without a key, before its path is looked up and its body is read.

    Open are GET and HEAD of exactly the `free` paths: compared with the path that the router will see, so that
    no spelling means one thing here and another there. `pages` are the body of a 401 for clients that get them.
    Of the POST requests of one key's name, `max_requests_per_key` may run or wait at once; 0 is no limit.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        free: frozenset[str],
        pages: Mapping[str, Response],
        max_requests_per_key: int = 0,
    ) -> None:
        self.app = app
        self.keys = keys
        self.free = free
        self.pages = pages
        self.max_requests_per_key = max_requests_per_key
        self._num_requests: Counter[str] = Counter()
        for page in pages.values():
            page.headers["WWW-Authenticate"] = CHALLENGE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_free(scope):
            await self.app(scope, receive, send)
            return
        name = self._key_name(scope)
        if name is None:
            if scope["method"] == "GET" and scope["path"] in self.pages:
                await self.pages[scope["path"]](scope, receive, send)
                return
            raise Unauthorized("A key is needed: send the header Authorization: Bearer KEY, or Api-Key KEY.")
        token = caller.set(replace(caller.get(), key=name))
        try:
            if scope["method"] == "POST":
                with self._counted(name):
                    await self.app(scope, receive, send)
            else:
                await self.app(scope, receive, send)
        finally:
            caller.reset(token)

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        """Count a request to generate while it runs.

        Raises:
            KeyBusy: as many of this key's name run as may.
        """
        metrics.key_requests_total.labels(name).inc()
        if 0 < self.max_requests_per_key <= self._num_requests[name]:
            raise KeyBusy(
                f"{self.max_requests_per_key} requests of this key are running or waiting, which is the limit.",
                retry_after_s=1,
            )
        self._num_requests[name] += 1
        try:
            yield
        finally:
            self._num_requests[name] -= 1

    def _is_free(self, scope: Scope) -> bool:
        return scope["method"] in ("GET", "HEAD") and scope["path"] in self.free

    def _key_name(self, scope: Scope) -> str | None:
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(sent) != 1:
            return None  # of two headers, a proxy before us may have judged the other one
        scheme, _, key = sent[0].partition(b" ")
        return self.keys.name_of(key.strip(b" ")) if scheme.decode("latin-1").lower() in SCHEMES else None
