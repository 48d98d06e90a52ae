"""All checks in the order of the report: the cluster first, then what the release needs of it."""

from __future__ import annotations

from mistral_cli.preflight.checks import (
    address,
    dry_runs,
    image,
    knative,
    monitoring,
    nodes,
    platform,
    quota,
    volumes,
    weights,
)
from mistral_cli.preflight.checks.finding import Finding
from mistral_cli.preflight.observed import External, Observed
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import Target


def run(release: Release, observed: Observed, external: External, target: Target) -> list[Finding]:
    """Return every finding."""
    return [
        *platform.check(release, observed, target),
        *knative.check(release, observed, target),
        *dry_runs.check(release, observed, target),
        *quota.check(release, observed, target),
        *weights.check(release, observed, external, target),
        *volumes.check(release, observed, target),
        *image.check(release, observed, external, target),
        *nodes.check(release, observed, target),
        *monitoring.check(release, observed, target),
        *address.check(release, observed, external, target),
    ]
