"""Checks Knative's ConfigMaps against what the pods and the annotations of the release need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from mistral_cli.objects import Object, dig
from mistral_cli.preflight.checks.finding import Finding, missing, ok, unknown
from mistral_cli.preflight.observed import Answer, Observed
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import Target

PREFIX = "kubernetes.podspec-"
FIELD_FLAGS = {
    "nodeSelector": "nodeselector", "tolerations": "tolerations", "affinity": "affinity",
    "runtimeClassName": "runtimeclassname", "priorityClassName": "priorityclassname",
    "topologySpreadConstraints": "topologyspreadconstraints", "hostAliases": "hostaliases",
    "initContainers": "init-containers", "securityContext": "securitycontext", "schedulerName": "schedulername",
    "dnsPolicy": "dnspolicy", "dnsConfig": "dnsconfig", "hostIPC": "hostipc", "hostPID": "hostpid",
    "hostNetwork": "hostnetwork", "shareProcessNamespace": "shareprocessnamespace",
}  # fmt: skip
VOLUME_FLAGS = {
    "persistentVolumeClaim": "persistent-volume-claim", "hostPath": "volumes-hostpath", "csi": "volumes-csi",
    "image": "volumes-image",
}  # fmt: skip
ON_BY_DEFAULT = frozenset({f"{PREFIX}persistent-volume-claim", f"{PREFIX}init-containers"})
"""Flags that are on by default (since Knative 1.17 for volumes); a finding names one only if it is off."""
DEFAULT_TIMEOUT_S = 600
INITIAL_SCALE = "autoscaling.knative.dev/initial-scale"
PROGRESS = "serving.knative.dev/progress-deadline"
LEAST_PROGRESS = "1800s"


def check(release: Release, observed: Observed, target: Target) -> Iterable[Finding]:
    """Yield a finding for each ConfigMap."""
    if not release.knative:
        return
    parts: dict[str, Callable[[Release, Mapping[str, str], Target], Finding]] = {
        "config-features": _features, "config-defaults": _defaults, "config-autoscaler": _autoscaler,
        "config-deployment": _deployment,
    }  # fmt: skip
    for name, part in parts.items():
        config: Answer[Object] = observed.configs.get(name, Answer())
        if config.unknown:
            yield unknown(name, config.unknown, target.cluster_rights())
        else:
            yield part(release, dig(config.value, "data") or {}, target)


def needed_flags(predictor: Object) -> dict[str, str]:
    """Return the flags that the pod needs, and what needs each."""
    flags = {PREFIX + flag: field for field, flag in FIELD_FLAGS.items() if predictor.get(field)}
    for volume in predictor.get("volumes") or ():
        flags |= {PREFIX + flag: f"volumes.{kind}" for kind, flag in VOLUME_FLAGS.items() if kind in volume}
    containers = predictor.get("containers") or ()
    if any(dig(variable, "valueFrom", "fieldRef") for each in containers for variable in each.get("env") or ()):
        flags[f"{PREFIX}fieldref"] = "env.valueFrom.fieldRef"
    return flags


def _features(release: Release, data: Mapping[str, str], target: Target) -> Finding:
    name = "config-features"
    flags = needed_flags(release.predictor)
    off = {flag: field for flag, field in flags.items() if not _is_on(flag, data)}
    if off:
        listed = ", ".join(f"{flag} (for {field})" for flag, field in off.items())
        command = target.configure(name, **dict.fromkeys(off, "enabled"))
        return missing(name, f"Knative refuses the pod without these flags: {listed}.", command)
    return ok(name, ", ".join(flags) or "no flag needed")


def _is_on(flag: str, data: Mapping[str, str]) -> bool:
    return str(data.get(flag, "enabled" if flag in ON_BY_DEFAULT else "disabled")).lower() in ("enabled", "allowed")


def _defaults(release: Release, data: Mapping[str, str], target: Target) -> Finding:
    name, key = "config-defaults", "max-revision-timeout-seconds"
    limit, wanted = int(data.get(key, DEFAULT_TIMEOUT_S)), int(release.predictor.get("timeout") or 0)
    if wanted > limit:
        message = f"A request may take {wanted} s in this release, and {key} is {limit}."
        return missing(name, message, target.configure(name, **{key: str(wanted)}))
    return ok(name, f"{key} is {limit}")


def _autoscaler(release: Release, data: Mapping[str, str], target: Target) -> Finding:
    name = "config-autoscaler"
    wanted = {}
    if release.annotations.get(INITIAL_SCALE) == "0" and data.get("allow-zero-initial-scale", "false") != "true":
        wanted["allow-zero-initial-scale"] = f"for {INITIAL_SCALE} 0"
    if release.predictor.get("minReplicas") == 0 and data.get("enable-scale-to-zero", "true") != "true":
        wanted["enable-scale-to-zero"] = "for minReplicas 0: otherwise a GPU stays taken for ever"
    if wanted:
        message = "; ".join(f"{key} must be true, {why}" for key, why in wanted.items())
        return missing(name, f"{message}.", target.configure(name, **dict.fromkeys(wanted, "true")))
    return ok(name, "allows the scaling that the release needs")


def _deployment(release: Release, data: Mapping[str, str], target: Target) -> Finding:
    """Check the deadline of the first start: the annotation decides, the ConfigMap's 600 s are short for 14 GB."""
    name, key = "config-deployment", "progress-deadline"
    if PROGRESS in release.annotations:
        return ok(name, f"the release sets its own {key}, {release.annotations[PROGRESS]}")
    if release.storage_uri and key not in data:
        message = f"Without the annotation {PROGRESS} the weights have 600 s to be downloaded and loaded."
        return missing(name, message, target.configure(name, **{key: LEAST_PROGRESS}))
    return ok(name, f"{key} is {data.get(key, '600s')}")
