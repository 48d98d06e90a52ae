"""The page at `/playground`: one static file, whose content security policy allows requests to this server only.

Owns the bytes and their headers. Knows neither KServe nor the API that the page calls.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PATH = "/playground"
CONTENT_TYPE = "text/html; charset=utf-8"


@cache
def page() -> bytes:
    """Return the page."""
    return Path(__file__).with_name("playground.html").read_bytes()


@cache
def headers() -> dict[str, str]:
    """Return the headers of the page; its own script and style are allowed by hash, and nothing else is."""
    policy = {
        "default-src": "'none'",
        "script-src": _hashes("script"),
        "style-src": _hashes("style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }


def response(status: int = 200) -> Response:
    """Return the page as a response; with 401 for a browser without a key, so that the key can be typed in."""
    return Response(page(), status, headers(), CONTENT_TYPE)


def route(path: str = PATH) -> Route:
    """Return the route to add to the application."""

    async def playground(request: Request) -> Response:
        return response()

    return Route(path, playground, methods=["GET"], include_in_schema=False)


def _hashes(tag: str) -> str:
    """Return the CSP sources of the page's inline elements of one kind."""
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page(), re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(block).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
