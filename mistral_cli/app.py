"""The command line of `mistral`: options in, exit code out."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer

from . import answer, body
from .batch.command import batch
from .connection import DEFAULT_URL, authorization, choose_endpoint
from .exit_codes import Failure, Misused
from .preflight.command import preflight
from .retry import Retry
from .rollout.command import app as rollout
from .session import Session
from .terminal import Terminal

MODELS_PATH = "/v1/models"

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(rollout, name="rollout")
app.command()(preflight)


def main() -> None:
    """Run the command; the console script's entry point."""
    app(prog_name="mistral")


@app.callback()
def mistral() -> None:
    """Send requests to a Mistral 7B server, and check and roll out its releases.

    If the server needs an API key, set MISTRAL_API_KEY or --api-key-file.
    """


@app.command(no_args_is_help=False)
def predict(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from stdin.")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", metavar="JSON", help="The whole request body.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A file with the request body; - is stdin.")] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", metavar="NAME=VALUE", help="Set one field of the body; repeatable."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send PROMPT as a chat message.")] = False,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print the text as it arrives (default: on a terminal)."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the server's JSON; streamed, one event a line.")
    ] = False,
    url: Annotated[str | None, typer.Option(help=f"The server (default: MISTRAL_URL, else {DEFAULT_URL}).")] = None,
    service: Annotated[
        str | None,
        typer.Option(metavar="NAMESPACE/NAME", help="An InferenceService of the current kubeconfig."),
    ] = None,
    ingress: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where to reach --service, such as http://localhost:8081."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model's name (default: the only one that the server lists).")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file whose first line is the key.")
    ] = None,
    wait_s: Annotated[
        float,
        typer.Option("--wait", min=1, metavar="SECONDS", help="Time until an answer must begin, cold start included."),
    ] = 900,
) -> None:
    """Generate text, as `truss predict` does.

    Exit codes: 0 the whole answer was printed, 1 the server refused, 2 wrong usage, 3 the answer was
    cut short, 4 none began within --wait, 5 the server cannot be found, 130 Ctrl-C.
    """
    terminal = Terminal()
    try:
        request = body.build(prompt, data, file, chat, parameters or [])
        request["stream"] = body.streams(request, stream, terminal.live and not as_json)
        headers = authorization(api_key_file) | {"x-request-id": uuid.uuid4().hex}
        with terminal, httpx.Client(headers=headers) as http:
            session = Session(http, choose_endpoint(url, service, ingress), Retry(wait_s, terminal.notice))
            path = f"{MODELS_PATH}/{quote(model or _only_model(session), safe='')}:predict"
            with session.open("POST", path, request) as response:
                (_print_stream if request["stream"] else _print_whole)(response, terminal, as_json)
    except Failure as failure:
        terminal.fail(str(failure))
        raise typer.Exit(failure.exit_code) from failure


app.command(no_args_is_help=True)(batch)


def _only_model(session: Session) -> str:
    with session.open("GET", MODELS_PATH) as response:
        listed = answer.whole(response)
    names = listed.get("models") if isinstance(listed, dict) else None
    if not isinstance(names, list) or len(names) != 1:
        raise Misused(f"Name the model with --model: the server lists {names or 'none'}.")
    return str(names[0])


def _print_stream(response: httpx.Response, terminal: Terminal, as_json: bool) -> None:
    last: Any = None
    for last in answer.pieces(response):
        terminal.write(json.dumps(last, ensure_ascii=False) + "\n" if as_json else answer.text(last))
    terminal.summary(last)


def _print_whole(response: httpx.Response, terminal: Terminal, as_json: bool) -> None:
    content = answer.whole(response)
    lines = [json.dumps(content, ensure_ascii=False)] if as_json else answer.texts(content)
    for line in lines:
        terminal.write(line if line.endswith("\n") else line + "\n")
