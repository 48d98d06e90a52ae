"""Checks that a Prometheus selects the release's PodMonitor and PrometheusRule: otherwise it ignores them silently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..rollout.state.observed import dig
from .answer import Object, Seen
from .finding import Finding, missing, ok, unknown
from .release import Release
from .where import Where

SELECTORS = {
    "PodMonitor": ("podMonitorSelector", "podMonitorNamespaceSelector", "monitoring.podMonitor.labels"),
    "PrometheusRule": ("ruleSelector", "ruleNamespaceSelector", "monitoring.prometheusRule.labels"),
}


def check(release: Release, seen: Seen, where: Where) -> Iterable[Finding]:
    """Yield a finding for each kind that the release holds and the cluster has."""
    kinds = seen.kinds.get("monitoring.coreos.com/v1")
    for kind in SELECTORS:
        objects = release.of_kind(kind)
        if objects and kinds and kind in (kinds.value or ()):
            yield _selected(kind, objects[0], seen, where)


def _selected(kind: str, monitor: Object, seen: Seen, where: Where) -> Finding:
    field, namespaces, value = SELECTORS[kind]
    if seen.prometheuses.unknown:
        return unknown(kind, seen.prometheuses.unknown, where.cluster_rights())
    prometheuses = seen.prometheuses.value or ()
    look = where.kubectl("get", "prometheuses,prometheusagents", "-A")
    if not prometheuses:
        return unknown(kind, f"There is no Prometheus object; another agent may read {kind}s.", look)
    labels = monitor["metadata"].get("labels") or {}
    near = [each for each in prometheuses if _in_reach(each, namespaces, seen, where)]
    for each in near:
        selector = dig(each, "spec", field)
        if selector is not None and matches(selector, labels):
            return ok(kind, f"selected by {each['metadata'].get('namespace')}/{each['metadata']['name']}")
    if not near:
        name = str(prometheuses[0]["metadata"]["name"])
        said = f"{name} looks for {kind}s in other namespaces ({namespaces})."
        wanted = dig(prometheuses[0], "spec", namespaces, "matchLabels") or {}
        pairs = [f"{key}={text}" for key, text in wanted.items()]
        command = where.kubectl("label", "namespace", where.namespace, *pairs) if pairs else look
        return missing(kind, said, command)
    wanted = dig(near[0], "spec", field, "matchLabels") or {}
    if not wanted:
        said = f"{near[0]['metadata']['name']} selects no {kind} with these labels ({field})."
        return missing(kind, said, where.kubectl("get", "prometheus", "-A", "-o", f"jsonpath={{..{field}}}"))
    sets = ",".join(f"{value}.{key.replace('.', chr(92) + '.')}={text}" for key, text in wanted.items())
    said = f"{near[0]['metadata']['name']} selects {kind}s labelled {_said(wanted)}, and the release's is not."
    return missing(kind, said, where.helm("--set", sets))


def _in_reach(prometheus: Object, field: str, seen: Seen, where: Where) -> bool:
    """Tell whether a Prometheus looks into the namespace: without a selector only into its own."""
    selector = dig(prometheus, "spec", field)
    if selector is None:
        return bool(prometheus["metadata"].get("namespace") == where.namespace)
    namespace = seen.namespace.value or {}
    labels = {"kubernetes.io/metadata.name": where.namespace, **(dig(namespace, "metadata", "labels") or {})}
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


def _said(labels: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())
