"""A function that runs `mistral predict` against a scripted server."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from mistral_cli.app import app
from tests.support.scripted_server import (
    Act,
    ScriptedServer,
)


def predict(*acts: Act, args: tuple[str, ...] = ("hi",), **settings: str) -> tuple[Result, ScriptedServer]:
    """Run `mistral predict` against a server that plays these acts."""
    with ScriptedServer(list(acts)) as server:
        result = CliRunner().invoke(app, ["predict", *args], env={"MISTRAL_URL": server.url, **settings})
    return result, server
