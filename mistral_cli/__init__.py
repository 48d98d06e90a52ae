"""The `mistral` command: ask a running model from a terminal or a script. Knows the wire, not the server."""

from .app import main

__all__ = ["main"]
