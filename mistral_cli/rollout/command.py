"""`mistral rollout`: options in, exit code out."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from ..cluster import Cluster, ClusterError, NotFound
from . import admission, drift, gates, plan, report, run
from .act import Actor
from .admission import CANARY, SWAP, Options, Refused
from .judge import Addresses, GateJudge
from .lock import Held, Lock, Lost, identity
from .measure import Meter
from .reader import Reader
from .status import compute, seconds

MISUSE, REFUSED, STUCK = 2, 3, 5

app = typer.Typer(
    no_args_is_help=True, help="Bring a new image to users step by step, measured, or put the old one back."
)

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
SharedOwnership = Annotated[
    bool, typer.Option("--shared-ownership", help="Argo CD or Flux owns the object and ignores image and percent.")
]


@dataclass(frozen=True)
class Ask:
    """What every verb needs to know."""

    name: str
    context: str
    namespace: str | None
    output: str = "text"
    timeout: str = "45m"
    gates: Path = gates.DEFAULT_FILE
    addresses: Addresses = Addresses()
    model: str | None = None
    api_key_file: Path | None = None
    gpu_wait: str = "10m"
    summary: Path | None = None


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
    gates: Gates = gates.DEFAULT_FILE,
    url: Url = "",
    host: Host = "",
    candidate_url: CandidateUrl = "",
    stable_url: StableUrl = "",
    model: Model = None,
    api_key_file: KeyFile = None,
    timeout: Timeout = "45m",
    gpu_wait: GpuWait = "10m",
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
    ask = Ask(name, context, namespace, output, timeout, gates, where, model, api_key_file, gpu_wait, summary)
    options = _options(image, strategy, steps, shared_ownership)
    if dry_run:
        _show(ask, lambda actor: _print_plan(actor, options))
    else:
        _act(ask, lambda actor: run.deploy(actor, options))


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
    _act(Ask(name, context, namespace, output, timeout, gpu_wait=gpu_wait), lambda actor: run.start(actor, options))


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
    thresholds = gates or _default_gates()
    ask = Ask(name, context, namespace, output, timeout, thresholds, where, model, api_key_file)
    _act(ask, lambda actor: run.step(actor, percent, measure=gates is not None))


@app.command()
def promote(
    name: Name, context: Context, namespace: Namespace = None, timeout: Timeout = "45m", output: Output = "text"
) -> None:
    """Give the new version all users."""
    _act(Ask(name, context, namespace, output, timeout), run.promote)


@app.command()
def stop(
    name: Name, context: Context, namespace: Namespace = None, timeout: Timeout = "10m", output: Output = "text"
) -> None:
    """Take users off the new version and leave it running, to be looked at."""
    _act(Ask(name, context, namespace, output, timeout), run.stop)


@app.command()
def revert(
    name: Name, context: Context, namespace: Namespace = None, timeout: Timeout = "45m", output: Output = "text"
) -> None:
    """Put the old image back and free the new one's GPU."""
    _act(Ask(name, context, namespace, output, timeout), run.revert_in_progress)


@app.command()
def status(name: Name, context: Context, namespace: Namespace = None) -> None:
    """Say where the service stands."""
    _show(Ask(name, context, namespace), _print_status)


@app.command()
def history(name: Name, context: Context, namespace: Namespace = None) -> None:
    """List the revisions and the rollouts that ended."""
    _show(Ask(name, context, namespace), _print_history)


def _default_gates() -> Path:
    return gates.DEFAULT_FILE


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


def _show(ask: Ask, what: Callable[[Actor], None]) -> None:
    """Run something that only reads."""
    with _failures(ask):
        what(_actor(ask, _cluster(ask)))


def _act(ask: Ask, verb: Callable[[Actor], str]) -> None:
    """Run a verb under the lock, and turn its outcome into an exit code."""
    begun_s = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cancelled CI job reverts like ^C
    with _failures(ask):
        actor = _actor(ask, _cluster(ask))
        actor.lock.acquire()
        try:
            with actor.lock.kept(actor.lost.set):
                outcome = verb(actor)
        finally:
            if not actor.lost.is_set():
                actor.lock.release()
        elapsed_s = time.monotonic() - begun_s
        _say_outcome(ask, actor, outcome, elapsed_s)
        raise typer.Exit(run.EXIT_CODES[outcome])


def _say_outcome(ask: Ask, actor: Actor, outcome: str, elapsed_s: float) -> None:
    actor.say(f"{outcome} after {elapsed_s:.0f} s")
    if outcome == run.STUCK:
        actor.say(
            f"The old image could not be put back. Look: mistral rollout status {ask.name} --context {ask.context}. "
            f"Try again: mistral rollout revert {ask.name} --context {ask.context}"
        )
    if (
        outcome == run.PROMOTED
        and actor.record
        and (said := drift.advice(actor.reader.read().service, actor.record.image))
    ):
        actor.say(said)
    if ask.summary:
        with ask.summary.open("a", encoding="utf-8") as file:
            file.write(report.as_markdown(outcome, actor.record, actor.judgements, elapsed_s))
    if ask.output == "json":
        print(json.dumps(report.as_json(outcome, actor.record, actor.judgements, elapsed_s)), flush=True)


@contextmanager
def _failures(ask: Ask) -> Iterator[None]:
    """Turn what ends a command early into its sentence and exit code."""
    if ask.output not in ("text", "json"):
        raise typer.BadParameter(f"--output is text or json, not {ask.output!r}.")
    try:
        yield
    except (Refused, Held) as error:
        _fail(ask, "refused", str(error), REFUSED)
    except NotFound as error:
        _fail(ask, "refused", f"There is no InferenceService {ask.name} there, or no KServe: {error}", REFUSED)
    except Lost as error:
        _fail(ask, "lost the lock", str(error), STUCK)
    except ClusterError as error:
        _fail(ask, "refused", str(error), REFUSED)
    except ValueError as error:
        _fail(ask, "misuse", str(error), MISUSE)
    except KeyboardInterrupt:
        said = f"Interrupted twice. Look: mistral rollout status {ask.name} --context {ask.context}; "
        _fail(ask, "stuck", f"{said}undo: mistral rollout revert {ask.name} --context {ask.context}", STUCK)


def _fail(ask: Ask, result: str, sentence: str, code: int) -> None:
    print(f"Error: {sentence}", file=sys.stderr, flush=True)
    if ask.output == "json":
        empty = report.as_json(result, None, (), 0) | {"reason": sentence}
        print(json.dumps(empty), flush=True)
    raise typer.Exit(code)


def _cluster(ask: Ask) -> Cluster:
    return Cluster(ask.context)


def _actor(ask: Ask, cluster: Cluster) -> Actor:
    namespace = ask.namespace or cluster.namespace
    thresholds = gates.load(ask.gates)
    outlet = sys.stderr if ask.output == "json" else sys.stdout

    def say(sentence: str) -> None:
        print(f"{datetime.now(UTC):%H:%M:%S} {sentence}", file=outlet, flush=True)

    return Actor(
        cluster=cluster,
        reader=Reader(cluster, namespace, ask.name),
        lock=Lock(cluster, namespace, ask.name, identity()),
        judge=GateJudge(
            thresholds,
            Meter(thresholds, _authorization(ask.api_key_file), ask.model),
            ask.addresses,
            namespace,
            ask.name,
        ),
        say=say,
        now=lambda: datetime.now(UTC),
        clock=time.monotonic,
        sleep=time.sleep,
        deadline_s=time.monotonic() + seconds(ask.timeout),
        gpu_wait_s=seconds(ask.gpu_wait),
    )


def _authorization(api_key_file: Path | None) -> dict[str, str]:
    """Return the header that carries the key; its value appears in no message."""
    key = os.environ.get("MISTRAL_API_KEY", "")
    if api_key_file is not None:
        try:
            key = api_key_file.read_text("utf-8").partition("\n")[0]
        except (OSError, UnicodeError) as error:
            raise ValueError(f"--api-key-file {api_key_file} cannot be read.") from error
    return {"Authorization": f"Api-Key {key.strip()}"} if key.strip() else {}


def _print_plan(actor: Actor, options: Options) -> None:
    observed = actor.reader.read(capacity=True)
    record = actor.lock.record()
    now = compute(observed)
    print(now.describe())
    if record is None or not record.unfinished:
        admission.check(observed, now, options)
        record = run.begin(observed, now, options, datetime.now(UTC))
    elif record.image != options.image or record.progress != "rolling":
        print(f"The rollout of {record.image} is unfinished and is undone first:")
        for each in plan.revert(now, record):
            print(f"  {plan.describe(each)}")
        return
    for each in plan.deploy(now, record, options.steps):
        print(plan.describe(each))
    print("If anything fails:")
    for each in plan.revert(now, record):
        print(f"  {plan.describe(each)}")


def _print_status(actor: Actor) -> None:
    observed, record = actor.reader.read(), actor.lock.record()
    for each in report.screen(observed, compute(observed, record.changed_at if record else None), record):
        print(each)


def _print_history(actor: Actor) -> None:
    observed = actor.reader.read()
    for each in report.revisions(observed, compute(observed), actor.lock.history()):
        print(each)
