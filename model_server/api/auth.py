"""API keys: a file of them, and the middleware that refuses a request without one.

The file is read again when it changes. `routes.py` names the paths that need no key; `middleware.py` writes the 401.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from model_server.errors import StartupError, Unauthorized

log = logging.getLogger(__name__)

SCHEMES = ("bearer", "api-key")
CHALLENGE = 'Bearer realm="model", Api-Key realm="model"'
"""The `WWW-Authenticate` of a refusal. A browser knows neither scheme: it shows the body and asks for no password."""
SENDABLE = re.compile(rb"[\x21-\x7e]+")
"""The characters that a header carries unchanged: visible ASCII, without a space."""


class ApiKeys:
    """The keys of a file, one a line; empty lines and lines that begin with `#` are ignored.

    The file is checked with every request, so that a rotated Secret counts at once. If it is missing or invalid, the
    last valid keys stay, and the log says so once.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._complaint: str | None = None
        try:
            self._signature = self._stat()
            self._digests = self._read()
        except (OSError, ValueError) as error:
            raise StartupError(f"--api_key_file: {_reason(file, error)}.") from None

    def accepts(self, key: bytes) -> bool:
        """Return whether this is one of the keys, in constant time."""
        self._refresh()
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, ours) for ours in self._digests]  # all of them, match or not
        return any(matches)

    def _refresh(self) -> None:
        try:
            signature = self._stat()
            if signature == self._signature:
                return
            self._digests = self._read()
        except (OSError, ValueError) as error:
            complaint = _reason(self._file, error)
            if complaint != self._complaint:
                log.error("%s: the keys read before stay valid", complaint)
            self._complaint = complaint
            return
        self._signature, self._complaint = signature, None
        log.info("read %d keys from %s", len(self._digests), self._file)

    def _stat(self) -> tuple[int, ...]:
        # Follows links: Kubernetes rotates a Secret by changing a symbolic link.
        found = self._file.stat()
        return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size

    def _read(self) -> tuple[bytes, ...]:
        keys = []
        for number, line in enumerate(self._file.read_bytes().splitlines(), start=1):
            key = line.strip()
            if not key or key.startswith(b"#"):
                continue
            if not SENDABLE.fullmatch(key):
                raise ValueError(f"line {number} of {self._file} has a space or a character that is not ASCII")
            keys.append(_digest(key))
        if not keys:
            raise ValueError(f"{self._file} holds no key")
        return tuple(keys)


def _digest(key: bytes) -> bytes:
    """Return a digest of fixed length, so that the comparison does not leak the length of a key."""
    return hashlib.sha256(key).digest()


def _reason(file: Path, error: Exception) -> str:
    return f"{file} cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)


class ApiKeyMiddleware:
    """Refuses every request without a key, before its path is looked up and its body is read.

    Open are GET and HEAD of exactly the `free` paths: compared with the path that the router will see, so that
    no spelling means one thing here and another there. `pages` are the body of a 401 for clients that get them.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, free: frozenset[str], pages: Mapping[str, Response]) -> None:
        self.app = app
        self.keys = keys
        self.free = free
        self.pages = pages
        for page in pages.values():
            page.headers["WWW-Authenticate"] = CHALLENGE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_free(scope) and not self._has_key(scope):
            if scope["method"] == "GET" and scope["path"] in self.pages:
                await self.pages[scope["path"]](scope, receive, send)
                return
            raise Unauthorized("A key is needed: send the header Authorization: Bearer KEY, or Api-Key KEY.")
        await self.app(scope, receive, send)

    def _is_free(self, scope: Scope) -> bool:
        return scope["method"] in ("GET", "HEAD") and scope["path"] in self.free

    def _has_key(self, scope: Scope) -> bool:
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(sent) != 1:
            return False  # of two headers, a proxy before us may have judged the other one
        scheme, _, key = sent[0].partition(b" ")
        return scheme.decode("latin-1").lower() in SCHEMES and self.keys.accepts(key.strip(b" "))
