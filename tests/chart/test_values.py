"""What the schema of the values refuses: wrong types, unknown keys, and what needs a Knative flag."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from charts.render_manifests import CHART
from tests.support.helm import Values, refusal, render

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())

WRONG: list[tuple[str, Any]] = [
    ("bogus", 1),
    ("server.bogus", 1),
    ("scaling.standard.bogus", 1),
    ("image.repository", 7),
    ("image.repository", "two words"),
    ("image.digest", "sha256:abc"),
    ("image.pullPolicy", "Sometimes"),
    ("image.pullSecrets", "one"),
    ("fullnameOverride", "Not_A_Name"),
    ("modelName", "two words"),
    ("inferenceService.mode", "Serverless"),
    ("inferenceService.create", "yes"),
    ("server.maxBatchSize", "two"),
    ("server.maxBatchSize", 0),
    ("server.maxQueueSize", -1),
    ("server.maxModelLen", 4096.5),
    ("server.dtype", "int8"),
    ("server.playground", "false"),
    ("server.logFormat", "xml"),
    ("server.corsOrigins", ["example.org"]),
    ("server.requestTimeoutSeconds", None),
    ("env", [{"name": "A"}, {"value": "no name"}]),
    ("env", [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]),
    ("storage.uri", "Mistral-7B"),
    ("storage.cache.size", "large"),
    ("storage.cache.accessModes", []),
    ("apiKeys.keys", ["short"]),
    ("gpu.count", 2),
    ("gpu.preset", "h100"),
    ("resources.requests", {"nvidia.com/gpu": 1}),
    ("shmSize", "2 gigabytes"),
    ("tolerations", [{"keys": "sku"}]),
    ("affinity", {"nodeAfinity": {}}),
    ("cluster.knativeFlags", ["podspec-affinity"]),
    ("scaling.minReplicas", -1),
    ("scaling.maxReplicas", 0),
    ("scaling.metric", "qps"),
    ("scaling.windowSeconds", 5),
    ("scaling.podRetentionSeconds", 7200),
    ("rollout.canaryTrafficPercent", 101),
    ("probes.readiness", {"periods": 5}),
    ("securityContext.capabilities", {"drop": "ALL"}),
    ("securityContext.privileged", True),
    ("probes.liveness.successThreshold", 2),
    ("affinity", {"nodeAffinity": {"foo": "bar"}}),
    ("scaling.maxReplicas", 3000000000),
    ("serviceAccount.secrets", ["Bad Name"]),
    ("networkPolicy.ingressNamespaces", ["Foo Bar"]),
    ("networkPolicy.extraIngress", [{"from": [{"ipBlock": {"cidr": "10.0.0.0"}}]}]),
    ("extraVolumes", [{"name": "disk", "hostPath": {"path": "/"}}]),
    ("extraVolumes", [{"name": "claim", "persistentVolumeClaim": {"claimName": "x"}}]),
    ("env", [{"name": "A", "value": "1", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]),
    ("gpu.resourceName", "gpu"),
    ("logger", {"mode": "everything"}),
    ("networkPolicy.egressPorts", [70000]),
    ("monitoring.prometheusRule.errorRatio", 5),
]

KNATIVE_FLAGS = [
    ({"nodeSelector": {"zone": "a"}, "gpu.preset": "none"}, "nodeselector"),
    ({"tolerations": [{"key": "sku"}], "gpu.preset": "none"}, "tolerations"),
    ({"affinity": {"nodeAffinity": {}}}, "affinity"),
    ({"runtimeClassName": "nvidia"}, "runtimeclassname"),
    ({"priorityClassName": "high"}, "priorityclassname"),
    ({"podSecurityContext": {"fsGroup": 1000}}, "securitycontext"),
    ({"hostAliases": [{"ip": "10.0.0.1", "hostnames": ["store"]}]}, "hostaliases"),
    (
        {"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}]},
        "topologyspreadconstraints",
    ),
]


@pytest.mark.parametrize(("path", "value"), WRONG)
def test_a_wrong_value_is_refused_by_name(path: str, value: Any) -> None:
    sentence = refusal({path: value})
    assert "values don't meet the specifications of the schema" in sentence
    assert path.split(".")[-1] in sentence


@pytest.mark.parametrize(("values", "flag"), KNATIVE_FLAGS)
def test_what_knative_forbids_needs_its_flag_declared(values: Values, flag: str) -> None:
    flag = f"kubernetes.podspec-{flag}"
    others = ["kubernetes.podspec-nodeselector", "kubernetes.podspec-tolerations"]
    refused = refusal({**values, "cluster.knativeFlags": [other for other in others if other != flag]})
    assert f'config-features -n knative-serving --type merge -p \'{{"data":{{"{flag}":"enabled"}}}}\'' in refused
    render({**values, "cluster.knativeFlags": [*others, *({flag} - {*others})]})


def objects(schema: dict[str, Any], at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every object of the schema that lists its properties."""
    if "properties" in schema:
        yield at, schema
    for word in ("properties", "definitions"):
        for name, part in schema.get(word, {}).items():
            yield from objects(part, f"{at}.{name}")
    if "items" in schema:
        yield from objects(schema["items"], f"{at}[]")


def test_the_schema_is_closed_everywhere() -> None:
    assert not [at for at, part in objects(SCHEMA) if part.get("additionalProperties") is not False]


def keys(values: dict[str, Any], schema: dict[str, Any], at: str = "") -> Iterator[tuple[str, bool, bool]]:
    """Yield each key of the values or the schema and whether each of them has it."""
    while "$ref" in schema:
        schema = SCHEMA["definitions"][schema["$ref"].rsplit("/", 1)[-1]]
    properties = schema.get("properties", {})
    for name in sorted(values.keys() | properties.keys()):
        yield f"{at}{name}", name in values, name in properties
        if isinstance(values.get(name), dict) and "properties" in properties.get(name, {}):
            yield from keys(values[name], properties[name], f"{at}{name}.")


def test_schema_and_values_have_the_same_keys() -> None:
    unequal = {key for key, in_values, in_schema in keys(DEFAULTS, SCHEMA) if in_values != in_schema}
    assert unequal == {"global"}, "Helm gives `global` to a chart that is a dependency; it has no default"
