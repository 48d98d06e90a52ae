"""Checks that a Prometheus selects the release's PodMonitor and PrometheusRule: otherwise it ignores them silently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mistral_cli.objects import Object, dig
from mistral_cli.preflight.checks.finding import Finding, missing, ok, unknown
from mistral_cli.preflight.observed import Observed
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import Target

SELECTORS = {
    "PodMonitor": ("podMonitorSelector", "podMonitorNamespaceSelector", "monitoring.podMonitor.labels"),
    "PrometheusRule": ("ruleSelector", "ruleNamespaceSelector", "monitoring.prometheusRule.labels"),
}


def check(release: Release, observed: Observed, target: Target) -> Iterable[Finding]:
    """Yield a finding for each kind that the release holds and the cluster has."""
    kinds = observed.kinds.get("monitoring.coreos.com/v1")
    for kind in SELECTORS:
        objects = release.of_kind(kind)
        if objects and kinds and kind in (kinds.value or ()):
            yield _selected(kind, objects[0], observed, target)


def _selected(kind: str, monitor: Object, observed: Observed, target: Target) -> Finding:
    field, namespaces, value = SELECTORS[kind]
    if observed.prometheuses.unknown:
        return unknown(kind, observed.prometheuses.unknown, target.cluster_rights())
    prometheuses = observed.prometheuses.value or ()
    look = target.kubectl("get", "prometheuses,prometheusagents", "-A")
    if not prometheuses:
        return unknown(kind, f"There is no Prometheus object; another agent may read {kind}s.", look)
    labels = monitor["metadata"].get("labels") or {}
    near = [each for each in prometheuses if _in_reach(each, namespaces, observed, target)]
    for each in near:
        selector = dig(each, "spec", field)
        if selector is not None and matches(selector, labels):
            return ok(kind, f"selected by {each['metadata'].get('namespace')}/{each['metadata']['name']}")
    if not near:
        name = str(prometheuses[0]["metadata"]["name"])
        message = f"{name} selects {kind}s only in other namespaces ({namespaces})."
        wanted = dig(prometheuses[0], "spec", namespaces, "matchLabels") or {}
        pairs = [f"{key}={text}" for key, text in wanted.items()]
        command = target.kubectl("label", "namespace", target.namespace, *pairs) if pairs else look
        return missing(kind, message, command)
    wanted = dig(near[0], "spec", field, "matchLabels") or {}
    if not wanted:
        message = f"{near[0]['metadata']['name']} selects no {kind} with these labels ({field})."
        return missing(kind, message, target.kubectl("get", "prometheus", "-A", "-o", f"jsonpath={{..{field}}}"))
    sets = ",".join(f"{value}.{key.replace('.', chr(92) + '.')}={text}" for key, text in wanted.items())
    message = f"{near[0]['metadata']['name']} selects {kind}s with {_pairs(wanted)}, which the release's lacks."
    return missing(kind, message, target.helm("--set", sets))


def _in_reach(prometheus: Object, field: str, observed: Observed, target: Target) -> bool:
    """Return whether a Prometheus selects the namespace; without a selector it selects only its own."""
    selector = dig(prometheus, "spec", field)
    if selector is None:
        return bool(prometheus["metadata"].get("namespace") == target.namespace)
    namespace = observed.namespace.value or {}
    labels = {"kubernetes.io/metadata.name": target.namespace, **(dig(namespace, "metadata", "labels") or {})}
    return matches(selector, labels)


def matches(selector: Object, labels: Mapping[str, Any]) -> bool:
    """Apply a label selector; an empty one selects everything."""
    wanted = selector.get("matchLabels") or {}
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(_holds(each, labels) for each in selector.get("matchExpressions") or ())


def _holds(expression: Object, labels: Mapping[str, Any]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or ()
    return {
        "In": value in values, "NotIn": value not in values, "Exists": value is not None,
        "DoesNotExist": value is None,
    }[str(expression["operator"])]  # fmt: skip


def _pairs(labels: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())
