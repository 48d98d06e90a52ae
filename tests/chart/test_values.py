"""What the chart refuses: wrong types by the schema, impossible combinations by a sentence each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from charts.render_manifests import CHART
from tests.chart.test_standard import STANDARD
from tests.support.helm import Values, refusal, render

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())

WRONG: list[tuple[str, Any]] = [
    ("bogus", 1),
    ("server.bogus", 1),
    ("scaling.standard.bogus", 1),
    ("image.repository", 7),
    ("image.repository", "UPPER"),
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
    ("networkPolicy.egressPorts", [70000]),
    ("monitoring.prometheusRule.errorRatio", 5),
]

STANDARD_HPA = {
    **STANDARD,
    "scaling.standard.autoscaler": "hpa",
    "scaling.metric": "cpu",
    "scaling.target": 80,
}
IMPOSSIBLE: list[tuple[Values, str]] = [
    ({"server.modelId": "a/b"}, "both say which weights to serve"),
    ({"server.modelDir": "/opt/demo-model"}, "both say which weights to serve"),
    ({"storage.uri": ""}, "Nothing says which weights to serve"),
    ({"server.modelRevision": "main"}, "server.modelRevision belongs to server.modelId"),
    ({"storage.uri": "hf://a/b/c"}, "must be hf://owner/model or hf://owner/model:revision"),
    ({"storage.cache.enabled": True, "storage.uri": "pvc://claim"}, "names nothing to download"),
    (
        {"storage.cache.enabled": True, "storage.cache.accessModes": ["ReadWriteOnce"]},
        "a volume for one node, but scaling.maxReplicas is above 1",
    ),
    ({"hfToken.secretName": "hf", "hfToken.token": "hf_x"}, "both give the token"),
    ({"apiKeys.secretName": "k", "apiKeys.keys": ["a-long-key"]}, "both give the API keys"),
    ({"apiKeys.secretName": "k", "server.apiKeyFile": "/keys"}, "both say where the API keys are"),
    ({"serviceAccount.create": False}, "serviceAccount.name is empty"),
    (
        {"serviceAccount.create": False, "serviceAccount.name": "sa", "hfToken.secretName": "hf"},
        "cannot attach download credentials",
    ),
    ({"env": [{"name": "MISTRAL_MAX_MODEL_LEN", "value": "1"}]}, "the value server.maxModelLen."),
    ({"env": [{"name": "PORT", "value": "80"}]}, "which Knative sets itself"),
    ({"env": [{"name": "PYTHONPATH", "value": "/x"}]}, "which KServe refuses"),
    ({"resources.limits.cpu": None}, "resources.limits.cpu is missing"),
    ({"resources.limits.memory": "8Gi"}, "is above resources.limits.memory 8Gi"),
    ({"gpu.count": 0}, "set gpu.preset to none"),
    ({"gpu.count": 0, "gpu.preset": "none", "server.dtype": "float16"}, "a CPU computes float16 slowly"),
    ({"scaling.minReplicas": 3}, "scaling.minReplicas 3 is above scaling.maxReplicas 2"),
    ({"scaling.metric": "cpu"}, "Knative scales on concurrency or rps"),
    ({"scaling.target": 161}, "it would never scale out"),
    ({"server.maxQueueSize": 1000}, "= 1032 is above 1000"),
    ({"server.requestTimeoutSeconds": 600}, "= 900 is above cluster.maxRevisionTimeoutSeconds 600"),
    ({"server.drainSeconds": 566}, "after which Knative kills the pod"),
    ({"cluster.knativeFlags": []}, "needs the Knative flag kubernetes.podspec-nodeselector"),
    ({**STANDARD, "scaling.minReplicas": 0}, "Standard mode cannot scale to zero"),
    ({**STANDARD, "rollout.canaryTrafficPercent": 0}, "Standard mode has none"),
    ({**STANDARD_HPA, "scaling.metric": "concurrency"}, "not one that an HPA here can read"),
    ({**STANDARD_HPA, "scaling.target": None}, "give the wanted percentage"),
    ({**STANDARD_HPA, "scaling.target": 101}, "a percentage for an HPA"),
    ({**STANDARD, "scaling.metric": "cpu"}, "not what KEDA is asked here"),
    ({**STANDARD, "scaling.standard.prometheusAddress": ""}, "set scaling.standard.prometheusAddress"),
    ({**STANDARD, "monitoring.podMonitor.enabled": False}, "which needs the server's metrics"),
    ({**STANDARD, "scaling.standard.autoscaler": "none"}, "make them equal"),
    ({"monitoring.prometheusRule.enabled": True}, "watches series that nothing would collect"),
    ({"networkPolicy.enabled": True, "networkPolicy.egressPorts": []}, "the weights could not be downloaded"),
]

KNATIVE_FLAGS = [
    ({"nodeSelector": {"zone": "a"}, "gpu.preset": "none"}, "nodeselector"),
    ({"tolerations": [{"key": "sku"}], "gpu.preset": "none"}, "tolerations"),
    ({"affinity": {"nodeAffinity": {}}}, "affinity"),
    ({"runtimeClassName": "nvidia"}, "runtimeclassname"),
    ({"priorityClassName": "high"}, "priorityclassname"),
    ({"podSecurityContext": {"fsGroup": 1000}}, "securitycontext"),
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


@pytest.mark.parametrize(("values", "words"), IMPOSSIBLE)
def test_an_impossible_combination_is_refused_with_a_sentence(values: Values, words: str) -> None:
    assert words in refusal(values)


def test_every_refusal_has_its_test() -> None:
    template = (CHART / "templates" / "validate.yaml").read_text()
    assert len(re.findall(r"append \$problems", template)) == len({words for _, words in IMPOSSIBLE})


def test_all_problems_are_told_at_once() -> None:
    sentences = refusal({"storage.uri": "", "gpu.count": 0, "scaling.metric": "cpu"})
    assert "which weights" in sentences
    assert "gpu.preset" in sentences
    assert "scaling.metric" in sentences


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
