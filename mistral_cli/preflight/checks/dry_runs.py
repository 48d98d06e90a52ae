"""Checks the answers to the two dry runs: refusals, and the requests and limits that KServe completed."""

from __future__ import annotations

from collections.abc import Iterable

from mistral_cli.objects import Object, dig, quantity
from mistral_cli.preflight.checks.finding import Finding, missing, ok, unknown
from mistral_cli.preflight.checks.refusals import fix
from mistral_cli.preflight.observed import Answer, Observed
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import Target

COMPLETED_BY_KSERVE = ("cpu", "memory")


def check(release: Release, observed: Observed, target: Target) -> Iterable[Finding]:
    """Yield a finding for each dry run, and one for the resources."""
    yield _service(release, observed, target)
    if observed.service_dry_run.value is not None:
        yield _resources(release, observed.service_dry_run.value, target)
    yield _pod(release, observed, target)


def _service(release: Release, observed: Observed, target: Target) -> Finding:
    name, answer = "InferenceService dry run", observed.service_dry_run
    if answer.refused:
        return missing(name, answer.refused, fix(answer.refused, release, target))
    if answer.value is None:
        return _not_run(name, answer, "serving.kserve.io", observed, target)
    return ok(name, "accepted by KServe")


def _pod(release: Release, observed: Observed, target: Target) -> Finding:
    answer = observed.pod_dry_run
    name = "Knative Service dry run" if release.knative else "Pod dry run"
    if answer.refused:
        return missing(name, answer.refused, fix(answer.refused, release, target))
    if answer.value is None:
        return _not_run(name, answer, "serving.knative.dev", observed, target)
    return ok(name, "accepted, and so is its pod" if release.knative else "accepted")


def _not_run(name: str, answer: Answer[Object], group: str, observed: Observed, target: Target) -> Finding:
    if answer.unknown:
        return unknown(name, answer.unknown, target.rights())
    if observed.namespace.value is None:
        message = f"The dry run needs the namespace {target.namespace}, which does not exist."
        return unknown(name, message, target.kubectl("create", "namespace", target.namespace))
    return unknown(name, f"The dry run needs {group}, which is not installed.", target.install(group))


def _resources(release: Release, answered: Object, target: Target) -> Finding:
    """Compare requests and limits as KServe completes them: it adds cpu 1 and memory 2Gi wherever one is missing."""
    name = "Requests and limits"
    above, absent, added = [], [], []
    containers = dig(answered, "spec", "predictor", "containers") or ()
    for container, asked in zip(containers, release.predictor["containers"], strict=False):
        resources = {side: dig(container, "resources", side) or {} for side in ("requests", "limits")}
        requests, limits = resources["requests"], resources["limits"]
        above += [
            (key, str(value), str(limits[key]))
            for key, value in requests.items()
            if key in limits and quantity(value) > quantity(limits[key])
        ]
        for side, amounts in resources.items():
            given = dig(asked, "resources", side) or {}
            absent += [f"{side}.{key}" for key in COMPLETED_BY_KSERVE if key not in amounts]
            added += [f"{side}.{key}={value}" for key, value in amounts.items() if key not in given]
    if above:
        message = "; ".join(f"{key}: the request {request} is above the limit {limit}" for key, request, limit in above)
        sets = ",".join(f"resources.limits.{key}={request}" for key, request, _ in above)
        note = f" KServe added {', '.join(added)}." if added else ""
        return missing(name, f"{message}: no pod would be created.{note}", target.helm("--set", sets))
    if absent:
        message = f"KServe's answer has no {', '.join(absent)}: its webhook did not complete the resources."
        return unknown(name, message, target.kubectl("get", "mutatingwebhookconfiguration"))
    return ok(name, f"KServe added {', '.join(added)}" if added else "complete; KServe added nothing")
