"""The arguments of a preflight check without a cluster: a rendered release and its target."""

from __future__ import annotations

from collections.abc import Iterable

from charts.render_manifests import render
from mistral_cli.preflight.checks.finding import Finding
from mistral_cli.preflight.release.manifests import Release, parse
from mistral_cli.preflight.target import Target

TARGET = Target("ctx", "mistral", "charts/mistral-7b", ("values.yaml",))


def release(scenario: str = "gfd") -> Release:
    return parse(render(scenario))


def named(found: Iterable[Finding], check: str) -> Finding:
    """Return the only finding of a check."""
    (finding,) = [each for each in found if each.check == check]
    return finding
