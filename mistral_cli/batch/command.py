"""The command line of `mistral batch`: options in, progress on stderr, exit code out."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import anyio
import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from mistral_cli.batch.concurrency import AdaptiveLimit
from mistral_cli.batch.requests import count_lines, read
from mistral_cli.batch.results import Results
from mistral_cli.batch.run import Progress, Runner
from mistral_cli.connection import authorization, choose_endpoint
from mistral_cli.endpoint import Endpoint
from mistral_cli.exit_codes import Failure, Misused, Refused
from mistral_cli.terminal import CONTROLS

LINE_EVERY_S = 10.0
"""Seconds between lines of progress where stderr is not a terminal."""


def batch(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="JSONL in OpenAI's batch format; - reads stdin.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="JSONL of answers; a run with an existing file continues it.")
    ],
    errors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSONL of failed requests (default: OUTPUT.errors).")
    ] = None,
    url: Annotated[str | None, typer.Option(help="The server (default: MISTRAL_URL, else this machine's).")] = None,
    service: Annotated[
        str | None, typer.Option(metavar="NAMESPACE/NAME", help="An InferenceService of the current kubeconfig.")
    ] = None,
    ingress: Annotated[str | None, typer.Option(metavar="URL", help="Where to reach --service.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file whose first line is the key.")
    ] = None,
    max_concurrency: Annotated[
        int, typer.Option(min=1, max=4096, help="Upper limit of requests in flight; the command finds the best number.")
    ] = 256,
    wait_s: Annotated[
        float, typer.Option("--wait", min=1, metavar="SECONDS", help="Time without any answer, cold start included.")
    ] = 900,
    request_timeout_s: Annotated[
        float, typer.Option("--request-timeout", min=1, metavar="SECONDS", help="Time for one answer to arrive.")
    ] = 900,
) -> None:
    """Send a file of requests and write the answers; run it again to continue after a stop.

    Exit codes: 0 every request was answered, 1 some are in the file of errors, 2 wrong usage, 4 no answer
    within --wait, 5 the server cannot be found, 130 Ctrl-C. After 4, 5 and 130 the next run continues.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        endpoint = choose_endpoint(url, service, ingress)
        headers = authorization(api_key_file)
        with contextlib.ExitStack() as files:
            file = _open(source, files)
            results = files.enter_context(Results(output, errors or output.with_name(output.name + ".errors")))
            progress = Progress()
            total = None if source == Path("-") else count_lines(source)
            with _reported(console, progress, results, total):
                limit = AdaptiveLimit(max_concurrency)
                anyio.run(_run, endpoint, headers, limit, progress, file, results, wait_s, request_timeout_s)
            if results.num_errors or progress.num_repeated:
                raise Refused(_complaint(results, progress))
    except Failure as failure:
        console.print(Text("Error: ", style="bold red") + Text(str(failure).translate(CONTROLS)))
        raise typer.Exit(failure.exit_code) from failure


async def _run(
    endpoint: Endpoint,
    headers: dict[str, str],
    limit: AdaptiveLimit,
    progress: Progress,
    file: BinaryIO,
    results: Results,
    wait_s: float,
    request_timeout_s: float,
) -> None:
    pool = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(headers=headers, limits=pool) as http:
        runner = Runner(http, endpoint, limit, progress, wait_s=wait_s, request_timeout_s=request_timeout_s)
        try:
            await runner.run(read(file), results)
        except* Failure as failures:
            raise failures.exceptions[0] from None


def _open(source: Path, files: contextlib.ExitStack) -> BinaryIO:
    if source == Path("-"):
        return sys.stdin.buffer
    try:
        return files.enter_context(source.open("rb"))
    except OSError as error:
        raise Misused(f"{source} cannot be read: {error.strerror}.") from error


@contextlib.contextmanager
def _reported(console: Console, progress: Progress, results: Results, total: int | None) -> Iterator[None]:
    """Show the progress while the block runs: a bar on a terminal, else a line from time to time."""
    begun_s = last_s = time.monotonic()
    bar = Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task("", total=total)

    def describe() -> str:
        speed = progress.num_tokens / max(time.monotonic() - begun_s, 0.001)
        facts = f"{speed:.0f} tokens/s, {progress.limit} in flight, {results.num_errors} errors"
        return f"{facts}; waiting: {progress.notice.translate(CONTROLS)}" if progress.notice else facts

    def show() -> None:
        nonlocal last_s
        bar.update(task, completed=progress.num_skipped + progress.num_repeated + progress.num_finished)
        now_s = time.monotonic()
        if now_s - last_s < (0.2 if console.is_terminal else LINE_EVERY_S):
            return
        last_s = now_s
        bar.update(task, description=Text(describe()).markup)
        if not console.is_terminal:
            console.print(f"{progress.num_finished} of {total or '?'} done: {describe()}", markup=False)

    progress.changed = show
    try:
        with bar:
            yield
    finally:
        seconds = time.monotonic() - begun_s
        console.print(
            f"{progress.num_finished} done in {seconds:.1f} s ({describe()}); "
            f"{progress.num_skipped} had a result from an earlier run.",
            markup=False,
        )


def _complaint(results: Results, progress: Progress) -> str:
    parts = []
    if results.num_errors:
        parts.append(f"{results.num_errors} requests failed: see the file of errors.")
    if progress.num_repeated:
        parts.append(f"{progress.num_repeated} lines repeat the custom_id of an earlier line and were skipped.")
    return " ".join(parts)
