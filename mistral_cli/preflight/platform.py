"""Checks the cluster itself: versions, the namespace, and the kinds of objects that the release is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..rollout.state.observed import dig
from .answer import Answer, Seen
from .finding import Finding, missing, ok, unknown
from .ksvc import COMPONENT_FIELDS
from .release import Release
from .where import Where

LEAST_KUBERNETES, LEAST_KNATIVE = (1, 33), (1, 21)
OWNERS = {"serving.kserve.io": "KServe", "serving.knative.dev": "Knative Serving", "keda.sh": "KEDA",
          "monitoring.coreos.com": "the Prometheus operator"}  # fmt: skip


def check(release: Release, seen: Seen, where: Where) -> Iterable[Finding]:
    """Yield a finding for each."""
    yield _kubernetes(seen, where)
    yield _namespace(seen, where)
    for version, kinds in seen.kinds.items():
        yield from _kinds(release, version, kinds, where)
    if seen.kinds.get("serving.kserve.io/v1beta1", Answer()).value:
        yield _fields(release, seen, where)
    if release.knative and seen.kinds.get("serving.knative.dev/v1", Answer()).value:
        yield from _knative(seen, where)


def _kubernetes(seen: Seen, where: Where) -> Finding:
    name, command = "Kubernetes version", where.kubectl("version")
    found = _numbers(seen.version.value or "")
    if found is None:
        return unknown(name, seen.version.unknown or f"The API server calls itself {seen.version.value!r}.", command)
    if found < LEAST_KUBERNETES:
        return unknown(
            name, f"{seen.version.value}: releases before {_said(LEAST_KUBERNETES)} are not tested.", command
        )
    return ok(name, str(seen.version.value))


def _namespace(seen: Seen, where: Where) -> Finding:
    name = "Namespace"
    if seen.namespace.unknown:
        return unknown(name, seen.namespace.unknown, where.cluster_rights())
    if seen.namespace.value is None:
        create = where.kubectl("create", "namespace", where.namespace)
        return missing(name, f"There is no namespace {where.namespace}: the dry runs need it.", create)
    return ok(name, where.namespace)


def _kinds(release: Release, version: str, kinds: Answer[frozenset[str]], where: Where) -> Iterable[Finding]:
    group = version.partition("/")[0]
    owner = OWNERS.get(group, group)
    name = f"{owner[0].upper()}{owner[1:]} {version.rpartition('/')[2]}"
    wanted = {str(o["kind"]) for o in release.objects if o["apiVersion"] == version}
    wanted |= {"Service"} if group == "serving.knative.dev" else set()
    wanted |= {"ScaledObject"} if group == "keda.sh" else set()
    if kinds.unknown:
        yield unknown(name, kinds.unknown, where.kubectl("api-resources", f"--api-group={group}"))
        return
    lacking = sorted(wanted - (kinds.value or frozenset()))
    if lacking:
        said = f"The cluster has no {version} {', '.join(lacking)}: install {owner}"
        more = ", or install without them." if group == "monitoring.coreos.com" else "."
        yield missing(name, said + more, where.install(group))
    else:
        yield ok(name, ", ".join(sorted(wanted)))


def _fields(release: Release, seen: Seen, where: Where) -> Finding:
    """Compare the fields that KServe itself reads: an older schema drops those that it does not know."""
    name, fields = "KServe fields", seen.predictor_fields
    if fields.unknown:
        return unknown(name, fields.unknown, where.cluster_rights())
    lacking = sorted(set(release.predictor) - (fields.value or frozenset()))
    if lacking:
        said = (
            f"This KServe's InferenceService has no spec.predictor.{', .'.join(lacking)}: it is older than the release."
        )
        return missing(name, said, where.install("serving.kserve.io"))
    return ok(name, ", ".join(sorted(set(release.predictor) & COMPONENT_FIELDS)))


def _knative(seen: Seen, where: Where) -> Iterable[Finding]:
    """Read Knative's version from the label of its ConfigMaps; a build from source calls itself `devel`."""
    labels = [dig(config.value, "metadata", "labels", "app.kubernetes.io/version") for config in seen.configs.values()]
    said = next((str(label) for label in labels if label and _numbers(str(label))), "")
    found = _numbers(said)
    if found is not None and found < LEAST_KNATIVE:
        least = _said(LEAST_KNATIVE)
        reason = f"Knative {said}: before {least} its dry run does not try the pod."
        yield missing("Knative version", reason, where.install("serving.knative.dev"))
    elif found is not None:
        yield ok("Knative version", said)


def _numbers(version: str) -> tuple[int, int] | None:
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def _said(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
