"""The `mistral` command: sends requests to a server from a terminal or a script. Knows HTTP, not the server's code."""

from .app import main

__all__ = ["main"]
