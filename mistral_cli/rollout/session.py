"""One run of the command: cluster, lock, outlet; the outcome becomes an exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import typer

from ..cluster import Cluster, ClusterError, NotFound
from . import admission, drift, plan, report, run
from .act import Actor
from .admission import Options, Refused
from .gates import DEFAULT_FILE, Gates, load
from .judge import Addresses, GateJudge
from .lock import Held, Lock, Lost, identity
from .measure import Meter
from .reader import Reader
from .record import Progress
from .status import Phase, compute, seconds

MISUSE, REFUSED, STUCK = 2, 3, 5


@dataclass(frozen=True)
class Ask:
    """The data that every verb needs."""

    name: str
    context: str
    namespace: str | None
    output: str = "text"
    timeout: str = "45m"
    gates: Path = DEFAULT_FILE
    addresses: Addresses = field(default_factory=Addresses)
    model: str | None = None
    api_key_file: Path | None = None
    gpu_wait: str = "10m"
    poll_s: float = 2.0
    summary: Path | None = None


def show(ask: Ask, what: Callable[[Actor], None]) -> None:
    """Run something that only reads."""
    thresholds = Gates(prompts=())
    with _failures(ask), closing(Meter(thresholds, {}, None)) as meter:
        what(_actor(ask, thresholds, meter))


def act(ask: Ask, verb: Callable[[Actor], str]) -> None:
    """Run a verb under the lock, and turn its outcome into an exit code."""
    begun_s = time.monotonic()
    # A cancelled CI job reverts like ^C, also where a shell started it in the background and had SIGINT ignored.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    with _failures(ask):
        thresholds = load(ask.gates)
        meter = Meter(thresholds, _authorization(ask.api_key_file), ask.model)
        actor = _actor(ask, thresholds, meter)
        try:
            actor.lock.acquire()
            with actor.lock.kept(actor.lost.set):
                outcome = verb(actor)
        finally:
            meter.close()
            with suppress(ClusterError):  # otherwise it expires
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


def _actor(ask: Ask, thresholds: Gates, meter: Meter) -> Actor:
    cluster = Cluster(ask.context)
    namespace = ask.namespace or cluster.namespace
    outlet = sys.stderr if ask.output == "json" else sys.stdout

    def say(sentence: str) -> None:
        if sentence:
            print(f"{datetime.now(UTC):%H:%M:%S} {sentence}", file=outlet, flush=True)

    return Actor(
        cluster=cluster,
        reader=Reader(cluster, namespace, ask.name),
        lock=Lock(cluster, namespace, ask.name, identity()),
        judge=GateJudge(thresholds, meter, ask.addresses, namespace, ask.name),
        say=say,
        now=lambda: datetime.now(UTC),
        clock=time.monotonic,
        sleep=time.sleep,
        deadline_s=time.monotonic() + seconds(ask.timeout),
        gpu_wait_s=seconds(ask.gpu_wait),
        poll_s=ask.poll_s,
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


def print_plan(actor: Actor, options: Options) -> None:
    """Print what `deploy` would do, from the functions that it executes."""
    observed = actor.reader.read(capacity=True)
    record = actor.lock.record()
    now = compute(observed)
    print(now.describe())
    if record is None or not record.unfinished:
        admission.check(observed, now, options)
        record = run.begin(observed, now, options, datetime.now(UTC))
    elif record.image != options.image or record.progress != Progress.ROLLING:
        print(f"The rollout of {record.image} is unfinished and is undone first:")
        for each in plan.revert(now, record):
            print(f"  {plan.describe(each)}")
        return
    for each in plan.deploy(now, record, options.steps):
        print(plan.describe(each))
    print("If anything fails:")
    for each in plan.revert(now, record):
        print(f"  {plan.describe(each)}")


def print_status(actor: Actor) -> None:
    """Print where the service stands; wait for it as long as the actor has time."""
    waits = actor.deadline_s > actor.clock()
    while True:
        actor.record = actor.lock.record()
        observed, now = actor.look()
        left_s = actor.deadline_s - actor.clock()
        if now.phase in (Phase.STABLE, Phase.FAILED) or left_s <= 0:
            break
        actor.sleep(min(actor.poll_s, left_s))
    for each in report.screen(observed, now, actor.record):
        print(each)
    if waits and now.phase != Phase.STABLE:
        raise typer.Exit(run.EXIT_CODES[run.REVERTED if now.phase == Phase.FAILED else run.TIMED_OUT])


def print_history(actor: Actor) -> None:
    """Print the revisions and the rollouts that ended."""
    observed = actor.reader.read()
    for each in report.revisions(observed, compute(observed), actor.lock.history()):
        print(each)
