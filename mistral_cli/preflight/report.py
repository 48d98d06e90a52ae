"""Prints the findings: a table for people, one JSON object for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from mistral_cli.preflight.checks.finding import Finding, State, result
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import Target

NARROWEST = 8


def as_json(found: Sequence[Finding], release: Release, target: Target) -> str:
    """Return one line of JSON."""
    return json.dumps(
        {
            "result": result(found).value,
            "inferenceservice": release.name,
            "namespace": target.namespace,
            "context": target.context,
            "findings": [finding.as_json() for finding in found],
        }
    )


def table(found: Sequence[Finding], release: Release, target: Target) -> Iterable[str]:
    """Yield the lines of the table; a command stands on a line of its own, to be copied."""
    yield f"{release.name} ({release.mode}) in namespace {target.namespace} of context {target.context}"
    yield ""
    states = max(NARROWEST, *(len(finding.state.value) for finding in found))
    names = max(len(finding.check) for finding in found)
    for finding in found:
        what = " ".join(finding.what.split())
        yield f"{finding.state.value:<{states}}  {finding.check:<{names}}  {what}"
        if finding.command:
            yield f"{'':<{states}}  {'':<{names}}  $ {finding.command}"
    counts = Counter(finding.state for finding in found)
    yield ""
    yield ", ".join(f"{counts[state]} {state.value}" for state in State)
