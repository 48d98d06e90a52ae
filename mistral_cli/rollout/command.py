"""`mistral rollout`: the options of every verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mistral_cli.rollout import verbs
from mistral_cli.rollout.gates.evaluator import Addresses
from mistral_cli.rollout.gates.rules import DEFAULT_FILE
from mistral_cli.rollout.planning.preconditions import CANARY, SWAP, Options
from mistral_cli.rollout.session import (
    CommandOptions,
    print_history,
    print_plan,
    print_status,
    run_locked,
    run_readonly,
)

app = typer.Typer(no_args_is_help=True, help="Roll out a new image step by step, or put the old one back.")

Name = Annotated[str, typer.Argument(help="The InferenceService.")]
Context = Annotated[str, typer.Option(help="The kubeconfig's context. Required.")]
Namespace = Annotated[str | None, typer.Option(help="The namespace; default: the context's.")]
Image = Annotated[str, typer.Option(help="The new image, by digest.")]
Gates = Annotated[Path, typer.Option(metavar="FILE", help="File with the limits; default: those of the package.")]
Url = Annotated[str, typer.Option(help="Address of the gateway, if the cluster's hosts do not resolve here.")]
Host = Annotated[str, typer.Option(help="The users' host; default: the host in the status.")]
CandidateUrl = Annotated[str, typer.Option(metavar="URL", help="Address of the new version only (Standard mode).")]
StableUrl = Annotated[str, typer.Option(metavar="URL", help="Address of the old version only (Standard mode).")]
Model = Annotated[str | None, typer.Option(help="The model's name; default: the only one that the server lists.")]
KeyFile = Annotated[Path | None, typer.Option("--api-key-file", metavar="FILE", help="Its first line is the API key.")]
Timeout = Annotated[str, typer.Option(help="Time limit of the command; after it, the old image is put back.")]
GpuWait = Annotated[str, typer.Option(help="How long the new pod may wait for a node.")]
Output = Annotated[str, typer.Option(metavar="text|json", help="json: the last line of stdout is one object.")]
Summary = Annotated[Path | None, typer.Option(metavar="FILE", help="Append a Markdown table, for a CI job.")]
Strategy = Annotated[
    str, typer.Option(metavar="canary|swap", help="canary (two GPUs) or swap (one GPU, with a pause).")
]
SharedOwnership = Annotated[
    bool,
    typer.Option("--shared-ownership", help="Proceed although Argo CD or Flux owns the object."),
]


@app.command()
def deploy(
    name: Name,
    image: Image,
    context: Context,
    namespace: Namespace = None,
    strategy: Annotated[
        str,
        typer.Option(metavar="canary|swap", help="canary (two GPUs) or swap (one GPU, with a pause)."),
    ] = CANARY,
    steps: Annotated[str, typer.Option(help="Percent of the traffic at each step.")] = "10,50",
    gates: Gates = DEFAULT_FILE,
    url: Url = "",
    host: Host = "",
    candidate_url: CandidateUrl = "",
    stable_url: StableUrl = "",
    model: Model = None,
    api_key_file: KeyFile = None,
    timeout: Timeout = "45m",
    gpu_wait: GpuWait = "10m",
    poll: Annotated[float, typer.Option(min=0.01, metavar="SECONDS", help="Seconds between two reads.")] = 2.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan with its reasons.")] = False,
    shared_ownership: SharedOwnership = False,
    output: Output = "text",
    summary: Summary = None,
) -> None:
    """Start, measure, step and promote. After a failure, send all traffic to the old image again.

    Exit codes: 0 promoted, 1 failed and reverted, 2 misuse, 3 refused before any change, 4 out of time and
    reverted, 5 could not revert.
    """
    where = Addresses(url, host, stable_url, candidate_url)
    command = CommandOptions(
        name, context, namespace, output, timeout, gates, where, model, api_key_file, gpu_wait, poll, summary
    )
    options = _options(image, strategy, steps, shared_ownership)
    if dry_run:
        run_readonly(command, lambda executor: print_plan(executor, options))
    else:
        run_locked(command, lambda executor: verbs.deploy(executor, options))


@app.command()
def start(
    name: Name,
    image: Image,
    context: Context,
    namespace: Namespace = None,
    percent: Annotated[int, typer.Option(min=0, max=99, help="Percent of the traffic once it is ready.")] = 0,
    timeout: Timeout = "45m",
    gpu_wait: GpuWait = "10m",
    shared_ownership: SharedOwnership = False,
    output: Output = "text",
) -> None:
    """Start the new image beside the old one and wait until it is ready."""
    options = Options(image, CANARY, (percent,), shared_ownership)
    run_locked(
        CommandOptions(name, context, namespace, output, timeout, gpu_wait=gpu_wait),
        lambda executor: verbs.start(executor, options),
    )


@app.command()
def step(
    name: Name,
    context: Context,
    percent: Annotated[int, typer.Option(min=1, max=99, help="Percent of the traffic for the new version.")],
    namespace: Namespace = None,
    gates: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Run the gates at this percentage, with the limits in this file."),
    ] = None,
    url: Url = "",
    candidate_url: CandidateUrl = "",
    stable_url: StableUrl = "",
    model: Model = None,
    api_key_file: KeyFile = None,
    timeout: Timeout = "45m",
    output: Output = "text",
) -> None:
    """Send a percentage of the traffic to the new version; with --gates, measure it there."""
    where = Addresses(url, "", stable_url, candidate_url)
    thresholds = gates or DEFAULT_FILE
    command = CommandOptions(name, context, namespace, output, timeout, thresholds, where, model, api_key_file)
    run_locked(command, lambda executor: verbs.step(executor, percent, measure=gates is not None))


@app.command()
def promote(
    name: Name, context: Context, namespace: Namespace = None, timeout: Timeout = "45m", output: Output = "text"
) -> None:
    """Send all traffic to the new version."""
    run_locked(CommandOptions(name, context, namespace, output, timeout), verbs.promote)


@app.command()
def stop(
    name: Name, context: Context, namespace: Namespace = None, timeout: Timeout = "10m", output: Output = "text"
) -> None:
    """Send no traffic to the new version, and keep it running."""
    run_locked(CommandOptions(name, context, namespace, output, timeout), verbs.stop)


@app.command()
def revert(
    name: Name, context: Context, namespace: Namespace = None, timeout: Timeout = "45m", output: Output = "text"
) -> None:
    """Put the old image back and free the new one's GPU."""
    run_locked(CommandOptions(name, context, namespace, output, timeout), verbs.revert_in_progress)


@app.command()
def status(
    name: Name,
    context: Context,
    namespace: Namespace = None,
    wait: Annotated[str, typer.Option(metavar="TIME", help="How long to wait until it is Stable.")] = "0s",
) -> None:
    """Show the status of the service.

    Exit codes with --wait: 0 Stable, 1 Failed, 4 out of time.
    """
    run_readonly(CommandOptions(name, context, namespace, timeout=wait), print_status)


@app.command()
def history(name: Name, context: Context, namespace: Namespace = None) -> None:
    """List the revisions and the rollouts that ended."""
    run_readonly(CommandOptions(name, context, namespace), print_history)


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
