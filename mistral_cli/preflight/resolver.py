"""Asks this machine's resolver for a host name."""

from __future__ import annotations

import socket

from .answer import Answer


def look(host: str) -> Answer[str]:
    """Return the address of a host; None: it has none here."""
    try:
        return Answer(str(socket.getaddrinfo(host, None)[0][4][0]))
    except (OSError, UnicodeError):
        return Answer(None)
