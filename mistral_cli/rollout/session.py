"""One run of the command: the cluster, the lock, the output, and the exit code."""

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
from typing import NoReturn

import typer

from mistral_cli.cluster import Cluster, ClusterError, Forbidden, NotFound, Unauthenticated
from mistral_cli.rollout import report, verbs
from mistral_cli.rollout.executor import Executor
from mistral_cli.rollout.gates.evaluator import Addresses, GateEvaluator
from mistral_cli.rollout.gates.measure import Meter
from mistral_cli.rollout.gates.rules import DEFAULT_FILE, Gates, load
from mistral_cli.rollout.lock import Lock, LockHeld, LockLost, identity
from mistral_cli.rollout.planning import drift, plan, preconditions
from mistral_cli.rollout.planning.preconditions import Options, Refused
from mistral_cli.rollout.reader import Reader
from mistral_cli.rollout.record import Progress
from mistral_cli.rollout.state.status import Phase, compute, seconds

MISUSE, REFUSED, STUCK, INTERRUPTED = 2, 3, 5, 130


@dataclass(frozen=True)
class CommandOptions:
    """The options that every verb has."""

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


def run_readonly(command: CommandOptions, what: Callable[[Executor], None]) -> None:
    """Run a verb that only reads."""
    thresholds = Gates(prompts=())
    with _failures(command), closing(Meter(thresholds, {}, None)) as meter:
        what(_executor(command, thresholds, meter))


def run_locked(command: CommandOptions, verb: Callable[[Executor], str]) -> None:
    """Run a verb under the lock, and turn its outcome into an exit code."""
    begun_s = time.monotonic()
    # A cancelled CI job reverts like ^C, also where a shell started it in the background and had SIGINT ignored.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    with _failures(command):
        thresholds = load(command.gates)
        meter = Meter(thresholds, _authorization(command.api_key_file), command.model)
        executor = _executor(command, thresholds, meter)
        try:
            executor.lock.acquire()
            with executor.lock.renewing(executor.lost.set):
                outcome = verb(executor)
        except KeyboardInterrupt:
            _fail_interrupted(command, executor)
        finally:
            meter.close()
            with suppress(ClusterError):  # otherwise it expires
                executor.lock.release()
        elapsed_s = time.monotonic() - begun_s
        _report_outcome(command, executor, outcome, elapsed_s)
        raise typer.Exit(verbs.EXIT_CODES[outcome])


def _report_outcome(command: CommandOptions, executor: Executor, outcome: str, elapsed_s: float) -> None:
    executor.log(f"{outcome} after {elapsed_s:.0f} s")
    if outcome == verbs.STUCK:
        executor.log(
            f"The old image could not be put back. Status: {_command_line(command, 'status')}. "
            f"Try again: {_command_line(command, 'revert')}"
        )
    if (
        outcome == verbs.PROMOTED
        and executor.record
        and (advice := drift.advice(executor.reader.read().service, executor.record.image))
    ):
        executor.log(advice)
    if command.summary:
        with command.summary.open("a", encoding="utf-8") as file:
            file.write(report.as_markdown(outcome, executor.record, executor.results, elapsed_s))
    if command.output == "json":
        print(json.dumps(report.as_json(outcome, executor.record, executor.results, elapsed_s)), flush=True)


@contextmanager
def _failures(command: CommandOptions) -> Iterator[None]:
    """Turn an error that ends a command into its sentence and exit code."""
    if command.output not in ("text", "json"):
        raise typer.BadParameter(f"--output is text or json, not {command.output!r}.")
    try:
        yield
    except (Refused, LockHeld) as error:
        _fail(command, "refused", str(error), REFUSED)
    except NotFound as error:
        _fail(command, "refused", f"There is no InferenceService {command.name} there, or no KServe: {error}", REFUSED)
    except LockLost as error:
        _fail(command, "lost the lock", str(error), STUCK)
    except Unauthenticated as error:
        _fail(command, "refused", str(error), REFUSED)
    except Forbidden as error:
        _fail(command, "refused", f"{error}. manifests/ci/rollout.yaml grants the rights of this command.", REFUSED)
    except ClusterError as error:
        _fail(command, "refused", str(error), REFUSED)
    except ValueError as error:
        _fail(command, "misuse", str(error), MISUSE)
    except KeyboardInterrupt:
        _fail(command, "interrupted", "Interrupted.", INTERRUPTED)


def _fail_interrupted(command: CommandOptions, executor: Executor) -> NoReturn:
    """End a command whose verb did not handle Ctrl-C: it had changed nothing, or it was reverting."""
    if executor.record is None or not executor.record.unfinished:
        _fail(command, "refused", "Interrupted before any change.", REFUSED)
    undo = f"Status: {_command_line(command, 'status')}. Undo: {_command_line(command, 'revert')}"
    _fail(command, "stuck", f"Interrupted before the rollout ended. {undo}", STUCK)


def _command_line(command: CommandOptions, verb: str) -> str:
    """Return the command of another verb for the same service."""
    namespace = f" --namespace {command.namespace}" if command.namespace else ""
    return f"mistral rollout {verb} {command.name} --context {command.context}{namespace}"


def _fail(command: CommandOptions, result: str, sentence: str, code: int) -> NoReturn:
    print(f"Error: {sentence}", file=sys.stderr, flush=True)
    if command.output == "json":
        empty = report.as_json(result, None, (), 0) | {"reason": sentence}
        print(json.dumps(empty), flush=True)
    raise typer.Exit(code)


def _executor(command: CommandOptions, thresholds: Gates, meter: Meter) -> Executor:
    cluster = Cluster(command.context)
    namespace = command.namespace or cluster.namespace
    outlet = sys.stderr if command.output == "json" else sys.stdout

    def log(sentence: str) -> None:
        if sentence:
            print(f"{datetime.now(UTC):%H:%M:%S} {sentence}", file=outlet, flush=True)

    return Executor(
        cluster=cluster,
        reader=Reader(cluster, namespace, command.name),
        lock=Lock(cluster, namespace, command.name, identity()),
        evaluator=GateEvaluator(thresholds, meter, command.addresses, namespace, command.name),
        log=log,
        now=lambda: datetime.now(UTC),
        clock=time.monotonic,
        sleep=time.sleep,
        deadline_s=time.monotonic() + seconds(command.timeout),
        gpu_wait_s=seconds(command.gpu_wait),
        poll_s=command.poll_s,
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


def print_plan(executor: Executor, options: Options) -> None:
    """Print the steps of `deploy`, from the functions that it executes."""
    observed = executor.reader.read(capacity=True)
    record = executor.lock.record()
    now = compute(observed)
    print(now.describe())
    if record is None or not record.unfinished:
        preconditions.check(observed, now, options)
        record = verbs.new_record(observed, now, options, datetime.now(UTC))
    elif record.image != options.image or record.progress != Progress.ROLLING:
        print(f"The rollout of {record.image} is unfinished and is reverted first:")
        for each in plan.revert(now, record):
            print(f"  {plan.describe(each)}")
        return
    for each in plan.deploy(now, record, options.steps):
        print(plan.describe(each))
    print("If anything fails:")
    for each in plan.revert(now, record):
        print(f"  {plan.describe(each)}")


def print_status(executor: Executor) -> None:
    """Print the status; wait until it is Stable or Failed, or the time is up."""
    waits = executor.deadline_s > executor.clock()
    while True:
        executor.record = executor.lock.record()
        observed, now = executor.refresh()
        left_s = executor.deadline_s - executor.clock()
        if now.phase in (Phase.STABLE, Phase.FAILED) or left_s <= 0:
            break
        executor.sleep(min(executor.poll_s, left_s))
    for each in report.screen(observed, now, executor.record):
        print(each)
    if waits and now.phase != Phase.STABLE:
        raise typer.Exit(verbs.EXIT_CODES[verbs.REVERTED if now.phase == Phase.FAILED else verbs.TIMED_OUT])


def print_history(executor: Executor) -> None:
    """Print the revisions and the rollouts that ended."""
    observed = executor.reader.read()
    for each in report.revisions(observed, compute(observed), executor.lock.history()):
        print(each)
