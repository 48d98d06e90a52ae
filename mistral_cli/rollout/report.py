"""The output of a rollout: a JSON object, a Markdown table for a CI job, and lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mistral_cli.objects import condition, dig
from mistral_cli.rollout.gates.rules import GateResult
from mistral_cli.rollout.planning import drift
from mistral_cli.rollout.record import Record
from mistral_cli.rollout.state.observed import Observed
from mistral_cli.rollout.state.status import Status


def as_json(outcome: str, record: Record | None, gates: Sequence[GateResult], seconds: float) -> dict[str, Any]:
    """Return the object that `--output json` ends with."""
    return {
        "result": outcome,
        "revision": record.image if record else None,
        "previous": record.previous_image if record else None,
        "reason": record.reason if record else "",
        "gates": [result.as_json() for result in gates],
        "seconds": round(seconds, 1),
    }


def as_markdown(outcome: str, record: Record | None, gates: Sequence[GateResult], seconds: float) -> str:
    """Return the summary of a CI job."""
    lines = [f"## Rollout: {outcome} ({seconds:.0f} s)", ""]
    if record:
        lines += [f"- new image: `{record.image}`", f"- old image: `{record.previous_image}`"]
        lines += [f"- reason: {record.reason}"] if record.reason else []
    lines += ["", "| gate | value | limit | passed | |", "|---|---|---|---|---|"]
    for gate in gates:
        word = {True: "yes", False: "**no**", None: "no data"}[gate.passed]
        value = "-" if gate.value is None else f"{gate.value:g}"
        lines.append(f"| {gate.name} | {value} | {gate.limit:g} | {word} | {gate.why.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def screen(observed: Observed, status: Status, record: Record | None) -> Iterable[str]:
    """Yield the lines of `rollout status`."""
    yield f"{observed.namespace}/{observed.name} ({observed.mode})"
    yield status.describe()
    for version in status.versions.all:
        role = {True: "stable"}.get(version == status.stable, "newest" if version == status.candidate else "")
        ready = "ready" if version.ready else "not ready"
        yield f"  {version.name}  {version.share:3d} %  {ready}  {role:6}  {version.image}"
    if record and record.unfinished:
        yield f"Unfinished: the rollout of {record.image} ({record.progress} since {record.changed})."
    if found := drift.owner(observed.service):
        yield f"Owned by {found.tool} ({found.name})."
        if last := drift.last_writer(observed.service):
            yield f"Its containers were last written by {last}."


def revisions(observed: Observed, status: Status, past: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Yield the lines of `rollout history`."""
    for version in status.versions.all:
        ready = condition(version.source, "Ready")
        state = "ready" if version.ready else str(ready.get("reason") or "not ready")
        created = dig(version.source, "metadata", "creationTimestamp") or ""
        yield f"{created}  {version.name}  {state}  {version.share} %  {version.image}"
    for record in past:
        reason = f": {record['reason']}" if record.get("reason") else ""
        yield f"{record['started'][:19]}Z  {record['progress']}  {record['image']}{reason}"
