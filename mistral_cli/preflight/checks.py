"""All checks in the order of the report: the cluster first, then what the release needs of it."""

from __future__ import annotations

from . import address, admission, gpu, image, knative, monitoring, platform, quota, volumes, weights
from .answer import Outside, Seen
from .finding import Finding
from .release import Release
from .where import Where


def findings(release: Release, seen: Seen, outside: Outside, where: Where) -> list[Finding]:
    """Return every finding."""
    return [
        *platform.check(release, seen, where),
        *knative.check(release, seen, where),
        *admission.check(release, seen, where),
        *quota.check(release, seen, where),
        *weights.check(release, seen, outside, where),
        *volumes.check(release, seen, where),
        *image.check(release, seen, outside, where),
        *gpu.check(release, seen, where),
        *monitoring.check(release, seen, where),
        *address.check(release, seen, outside, where),
    ]
