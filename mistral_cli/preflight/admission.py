"""Checks the answers to the two dry runs: what mends a refusal, and the requests and limits that KServe completed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable

from ..rollout.planning.capacity import quantity
from ..rollout.state.observed import dig
from .answer import Answer, Object, Seen
from .finding import Finding, missing, ok, unknown
from .knative import needed_flags
from .release import Release
from .where import KNATIVE_NAMESPACE, Where

MENDABLE = ("cpu", "memory")
Mend = Callable[[re.Match[str], Release, Where], str]


def check(release: Release, seen: Seen, where: Where) -> Iterable[Finding]:
    """Yield a finding for each dry run, and one for the resources."""
    yield _service(release, seen, where)
    if seen.tried_service.value is not None:
        yield _resources(release, seen.tried_service.value, where)
    yield _pod(release, seen, where)


def _service(release: Release, seen: Seen, where: Where) -> Finding:
    name, tried = "InferenceService dry run", seen.tried_service
    if tried.refused:
        return missing(name, tried.refused, _mend(tried.refused, release, where))
    if tried.value is None:
        return _untried(name, tried, "serving.kserve.io", seen, where)
    return ok(name, "accepted by KServe")


def _pod(release: Release, seen: Seen, where: Where) -> Finding:
    tried = seen.tried_pod
    name = "Knative Service dry run" if release.knative else "Pod dry run"
    if tried.refused:
        return missing(name, tried.refused, _mend(tried.refused, release, where))
    if tried.value is None:
        return _untried(name, tried, "serving.knative.dev", seen, where)
    return ok(name, "accepted, and its pod too" if release.knative else "accepted")


def _untried(name: str, tried: Answer[Object], group: str, seen: Seen, where: Where) -> Finding:
    if tried.unknown:
        return unknown(name, tried.unknown, where.rights())
    if seen.namespace.value is None:
        why = f"It cannot be tried before namespace {where.namespace} is there."
        return unknown(name, why, where.kubectl("create", "namespace", where.namespace))
    return unknown(name, f"It cannot be tried before {group} is installed.", where.install(group))


def _resources(release: Release, answered: Object, where: Where) -> Finding:
    """Compare requests and limits as KServe completes them: it adds cpu 1 and memory 2Gi wherever one is missing."""
    name = "Requests and limits"
    above, absent, added = [], [], []
    containers = dig(answered, "spec", "predictor", "containers") or ()
    for container, asked in zip(containers, release.predictor["containers"], strict=False):
        requests, limits = dig(container, "resources", "requests") or {}, dig(container, "resources", "limits") or {}
        above += [
            (key, str(value), str(limits[key]))
            for key, value in requests.items()
            if key in limits and quantity(value) > quantity(limits[key])
        ]
        absent += [f"{side}.{key}" for side, has in (("requests", requests), ("limits", limits)) for key in MENDABLE
                   if key not in has]  # fmt: skip
        added += [f"{side}.{key}={value}" for side, has in (("requests", requests), ("limits", limits))
                  for key, value in has.items() if key not in (dig(asked, "resources", side) or {})]  # fmt: skip
    if above:
        said = "; ".join(f"{key}: the request {request} is above the limit {limit}" for key, request, limit in above)
        sets = ",".join(f"resources.limits.{key}={request}" for key, request, _ in above)
        note = f" KServe added {', '.join(added)}." if added else ""
        return missing(name, f"{said}: no pod would be created.{note}", where.helm("--set", sets))
    if absent:
        said = f"KServe's answer has no {', '.join(absent)}: its webhook does not complete the resources here."
        return unknown(name, said, where.kubectl("get", "mutatingwebhookconfiguration"))
    return ok(name, f"KServe added {', '.join(added)}" if added else "complete; KServe added nothing")


def _mend(sentence: str, release: Release, where: Where) -> str:
    """Return the commands for everything that the sentence names: a webhook lists several objections at once."""
    mends = [mend(found, release, where) for pattern, mend in MENDS if (found := re.search(pattern, sentence))]
    return " && ".join(dict.fromkeys(mends)) or where.here("apply", "--dry-run=server", "-f", "RENDERED.yaml")


def _flags(found: re.Match[str], release: Release, where: Where) -> str:
    return where.configure("config-features", **dict.fromkeys(needed_flags(release.predictor), "enabled"))


def _timeout(found: re.Match[str], release: Release, where: Where) -> str:
    return where.configure("config-defaults", **{"max-revision-timeout-seconds": found[1]})


def _quota(found: re.Match[str], release: Release, where: Where) -> str:
    """Raise every key that the refusal names to what is used and two more of what was asked."""
    asked, used = _amounts(found[2]), _amounts(found[3])
    hard = {key: f"{quantity(used.get(key, '0')) + 3 * quantity(value):f}" for key, value in asked.items()}
    patch = json.dumps({"spec": {"hard": hard}})
    return where.here("patch", "resourcequota", found[1], "--type", "merge", "-p", patch)


def _amounts(said: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in said.split(",") if "=" in part)


def _webhook(found: re.Match[str], release: Release, where: Where) -> str:
    kserve = "kserve" in found[1]
    namespace, deployment = ("kserve", "kserve-controller-manager") if kserve else (KNATIVE_NAMESPACE, "webhook")
    return where.kubectl("-n", namespace, "rollout", "status", f"deployment/{deployment}")


MENDS: tuple[tuple[str, Mend], ...] = (
    (r"failed calling webhook \"([^\"]+)\"", _webhook),
    (r"exceeded quota: (\S+), requested: (\S+), used: (\S+), limited", _quota),
    (r"must not set the field|is disabled|feature is disabled", _flags),
    (r"expected 0 <= (\d+) <= \d+", _timeout),
    (r"strict decoding error|unknown field", lambda found, release, where: where.install("serving.kserve.io")),
    (r"initial-scale|initialScale",
     lambda found, release, where: where.configure("config-autoscaler", **{"allow-zero-initial-scale": "true"})),
    (r"violates PodSecurity",
     lambda found, release, where: where.kubectl("label", "namespace", where.namespace, "--overwrite",
                                                 "pod-security.kubernetes.io/enforce=baseline")),
    (r"(?:maximum|minimum) (\w+) usage per", lambda found, release, where: where.here("edit", "limitrange")),
    (r"no PriorityClass with name (\S+)",
     lambda found, release, where: where.kubectl("create", "priorityclass", found[1], "--value", "1000")),
    (r"must be less than or equal to (cpu|memory) limit",
     lambda found, release, where: where.helm("--set", f"resources.limits.{found[1]}={_request(release, found[1])}")),
    (r"deploymentMode",
     lambda found, release, where: where.here("delete", "inferenceservice", release.name)),
)  # fmt: skip


def _request(release: Release, resource: str) -> str:
    return str(dig(release.container, "resources", "requests", resource))
