"""`mistral rollout`: the options of every verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import run
from .admission import CANARY, SWAP, Options
from .gates import DEFAULT_FILE
from .judge import Addresses
from .session import Ask, act, print_history, print_plan, print_status, show

app = typer.Typer(no_args_is_help=True, help="Bring a new image to users step by step, or put the old one back.")

Name = Annotated[str, typer.Argument(help="The InferenceService.")]
Context = Annotated[str, typer.Option(help="The kubeconfig's context; never guessed.")]
Namespace = Annotated[str | None, typer.Option(help="Default: the context's own.")]
Image = Annotated[str, typer.Option(help="The new image, by digest.")]
Gates = Annotated[Path, typer.Option(metavar="FILE", help="Thresholds; default: those that ship.")]
Url = Annotated[str, typer.Option(help="The gateway, where the cluster's own hosts do not resolve.")]
Host = Annotated[str, typer.Option(help="The users' host; default: as the status says.")]
CandidateUrl = Annotated[str, typer.Option(metavar="URL", help="Where the new version alone answers (Standard mode).")]
StableUrl = Annotated[str, typer.Option(metavar="URL", help="Where the old version alone answers (Standard mode).")]
Model = Annotated[str | None, typer.Option(help="The model's name; default: the only one there.")]
KeyFile = Annotated[Path | None, typer.Option("--api-key-file", metavar="FILE", help="Its first line is the key.")]
Timeout = Annotated[str, typer.Option(help="For the whole command; afterwards the old image comes back.")]
GpuWait = Annotated[str, typer.Option(help="How long the new pod may find no node.")]
Output = Annotated[str, typer.Option(metavar="text|json", help="json: the last line of stdout is one object.")]
Summary = Annotated[Path | None, typer.Option(metavar="FILE", help="Append a Markdown table, for a CI job.")]
Strategy = Annotated[str, typer.Option(metavar="canary|swap", help="swap: one GPU, a pause, no lost request.")]
SharedOwnership = Annotated[
    bool, typer.Option("--shared-ownership", help="Argo CD or Flux owns the object and ignores image and percent.")
]


@app.command()
def deploy(
    name: Name,
    image: Image,
    context: Context,
    namespace: Namespace = None,
    strategy: Annotated[
        str, typer.Option(metavar="canary|swap", help="swap: one GPU, a pause, no lost request.")
    ] = CANARY,
    steps: Annotated[str, typer.Option(help="Percent of the users at each step.")] = "10,50",
    gates: Gates = DEFAULT_FILE,
    url: Url = "",
    host: Host = "",
    candidate_url: CandidateUrl = "",
    stable_url: StableUrl = "",
    model: Model = None,
    api_key_file: KeyFile = None,
    timeout: Timeout = "45m",
    gpu_wait: GpuWait = "10m",
    poll: Annotated[float, typer.Option(min=0.01, metavar="SECONDS", help="Between two looks at the cluster.")] = 2.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan with its reasons.")] = False,
    shared_ownership: SharedOwnership = False,
    output: Output = "text",
    summary: Summary = None,
) -> None:
    """Start, measure, step, promote; whatever fails, the old image has all users again.

    Exit codes: 0 promoted, 1 found bad and reverted, 2 misuse, 3 refused before anything was touched,
    4 out of time and reverted, 5 could not revert.
    """
    where = Addresses(url, host, stable_url, candidate_url)
    ask = Ask(name, context, namespace, output, timeout, gates, where, model, api_key_file, gpu_wait, poll, summary)
    options = _options(image, strategy, steps, shared_ownership)
    if dry_run:
        show(ask, lambda actor: print_plan(actor, options))
    else:
        act(ask, lambda actor: run.deploy(actor, options))


@app.command()
def start(
    name: Name,
    image: Image,
    context: Context,
    namespace: Namespace = None,
    percent: Annotated[int, typer.Option(min=0, max=99, help="Users on it once it is ready.")] = 0,
    timeout: Timeout = "45m",
    gpu_wait: GpuWait = "10m",
    shared_ownership: SharedOwnership = False,
    output: Output = "text",
) -> None:
    """Bring the new image up beside the old one and wait until it is ready."""
    options = Options(image, CANARY, (percent,), shared_ownership)
    act(Ask(name, context, namespace, output, timeout, gpu_wait=gpu_wait), lambda actor: run.start(actor, options))


@app.command()
def step(
    name: Name,
    context: Context,
    percent: Annotated[int, typer.Option(min=1, max=99, help="Users on the new version.")],
    namespace: Namespace = None,
    gates: Annotated[Path | None, typer.Option(metavar="FILE", help="Measure there, by these thresholds.")] = None,
    url: Url = "",
    candidate_url: CandidateUrl = "",
    stable_url: StableUrl = "",
    model: Model = None,
    api_key_file: KeyFile = None,
    timeout: Timeout = "45m",
    output: Output = "text",
) -> None:
    """Give the new version a share of the users; with --gates, measure it there."""
    where = Addresses(url, "", stable_url, candidate_url)
    thresholds = gates or DEFAULT_FILE
    ask = Ask(name, context, namespace, output, timeout, thresholds, where, model, api_key_file)
    act(ask, lambda actor: run.step(actor, percent, measure=gates is not None))


@app.command()
def promote(
    name: Name, context: Context, namespace: Namespace = None, timeout: Timeout = "45m", output: Output = "text"
) -> None:
    """Give the new version all users."""
    act(Ask(name, context, namespace, output, timeout), run.promote)


@app.command()
def stop(
    name: Name, context: Context, namespace: Namespace = None, timeout: Timeout = "10m", output: Output = "text"
) -> None:
    """Take users off the new version and leave it running, to be looked at."""
    act(Ask(name, context, namespace, output, timeout), run.stop)


@app.command()
def revert(
    name: Name, context: Context, namespace: Namespace = None, timeout: Timeout = "45m", output: Output = "text"
) -> None:
    """Put the old image back and free the new one's GPU."""
    act(Ask(name, context, namespace, output, timeout), run.revert_in_progress)


@app.command()
def status(
    name: Name,
    context: Context,
    namespace: Namespace = None,
    wait: Annotated[str, typer.Option(metavar="TIME", help="Wait so long until it is Stable.")] = "0s",
) -> None:
    """Say where the service stands.

    With --wait: 0 Stable, 1 Failed, 4 out of time.
    """
    show(Ask(name, context, namespace, timeout=wait), print_status)


@app.command()
def history(name: Name, context: Context, namespace: Namespace = None) -> None:
    """List the revisions and the rollouts that ended."""
    show(Ask(name, context, namespace), print_history)


def _options(image: str, strategy: str, steps: str, shared_ownership: bool) -> Options:
    if strategy not in (CANARY, SWAP):
        raise typer.BadParameter(f"--strategy is {CANARY} or {SWAP}, not {strategy!r}.")
    try:
        percents = tuple(int(step) for step in steps.split(",") if step)
    except ValueError as error:
        raise typer.BadParameter(f"--steps {steps!r} is not a list such as 10,50.") from error
    if list(percents) != sorted(set(percents)) or any(not 0 < percent < 100 for percent in percents):
        raise typer.BadParameter(f"--steps {steps!r} must rise, between 1 and 99.")
    return Options(image, strategy, percents, shared_ownership)
