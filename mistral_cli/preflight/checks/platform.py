"""Checks the cluster itself: versions, the namespace, and the kinds of objects that the release is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mistral_cli.objects import dig
from mistral_cli.preflight.checks.finding import Finding, missing, ok, unknown
from mistral_cli.preflight.observed import Answer, Observed
from mistral_cli.preflight.release.knative_service import COMPONENT_FIELDS
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import Target

LEAST_KUBERNETES, LEAST_KNATIVE = (1, 33), (1, 21)
OWNERS = {"serving.kserve.io": "KServe", "serving.knative.dev": "Knative Serving", "keda.sh": "KEDA",
          "monitoring.coreos.com": "the Prometheus operator"}  # fmt: skip


def check(release: Release, observed: Observed, target: Target) -> Iterable[Finding]:
    """Yield a finding for each."""
    yield _kubernetes(observed, target)
    yield _namespace(observed, target)
    for version, kinds in observed.kinds.items():
        yield from _kinds(release, version, kinds, target)
    if observed.kinds.get("serving.kserve.io/v1beta1", Answer()).value:
        yield _fields(release, observed, target)
    if release.knative and observed.kinds.get("serving.knative.dev/v1", Answer()).value:
        yield from _knative(observed, target)


def _kubernetes(observed: Observed, target: Target) -> Finding:
    name, command = "Kubernetes version", target.kubectl("version")
    found = _numbers(observed.version.value or "")
    if found is None:
        message = observed.version.unknown or f"The API server calls itself {observed.version.value!r}."
        return unknown(name, message, command)
    if found < LEAST_KUBERNETES:
        message = f"{observed.version.value}: releases before {_dotted(LEAST_KUBERNETES)} are not tested."
        return unknown(name, message, command)
    return ok(name, str(observed.version.value))


def _namespace(observed: Observed, target: Target) -> Finding:
    name = "Namespace"
    if observed.namespace.unknown:
        return unknown(name, observed.namespace.unknown, target.cluster_rights())
    if observed.namespace.value is None:
        create = target.kubectl("create", "namespace", target.namespace)
        return missing(name, f"There is no namespace {target.namespace}: the dry runs need it.", create)
    return ok(name, target.namespace)


def _kinds(release: Release, version: str, kinds: Answer[frozenset[str]], target: Target) -> Iterable[Finding]:
    group = version.partition("/")[0]
    owner = OWNERS.get(group, group)
    name = f"{owner[0].upper()}{owner[1:]} {version.rpartition('/')[2]}"
    wanted = {str(o["kind"]) for o in release.objects if o["apiVersion"] == version}
    wanted |= {"Service"} if group == "serving.knative.dev" else set()
    wanted |= {"ScaledObject"} if group == "keda.sh" else set()
    if kinds.unknown:
        yield unknown(name, kinds.unknown, target.kubectl("api-resources", f"--api-group={group}"))
        return
    lacking = sorted(wanted - (kinds.value or frozenset()))
    if lacking:
        message = f"The cluster has no {version} {', '.join(lacking)}: install {owner}"
        more = ", or install without them." if group == "monitoring.coreos.com" else "."
        yield missing(name, message + more, target.install(group))
    else:
        yield ok(name, ", ".join(sorted(wanted)))


def _fields(release: Release, observed: Observed, target: Target) -> Finding:
    """Compare the fields that KServe itself reads: an older schema drops those that it does not know."""
    name, fields = "KServe fields", observed.predictor_fields
    if fields.unknown:
        return unknown(name, fields.unknown, target.cluster_rights())
    lacking = sorted(set(release.predictor) - (fields.value or frozenset()))
    if lacking:
        message = (
            f"This KServe's InferenceService has no spec.predictor.{', .'.join(lacking)}: it is older than the release."
        )
        return missing(name, message, target.install("serving.kserve.io"))
    return ok(name, ", ".join(sorted(set(release.predictor) & COMPONENT_FIELDS)))


def _knative(observed: Observed, target: Target) -> Iterable[Finding]:
    """Read Knative's version from the label of its ConfigMaps; a build from source calls itself `devel`."""
    configs = observed.configs.values()
    labels = [dig(config.value, "metadata", "labels", "app.kubernetes.io/version") for config in configs]
    version = next((str(label) for label in labels if label and _numbers(str(label))), "")
    found = _numbers(version)
    if found is not None and found < LEAST_KNATIVE:
        message = f"Knative {version}: before {_dotted(LEAST_KNATIVE)} its dry run does not try the pod."
        yield missing("Knative version", message, target.install("serving.knative.dev"))
    elif found is not None:
        yield ok("Knative version", version)


def _numbers(version: str) -> tuple[int, int] | None:
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
