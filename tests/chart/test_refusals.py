"""What the chart refuses with a sentence: values that fit the schema and that no cluster would run."""

from __future__ import annotations

import re
from functools import cache

import pytest

from charts.render_manifests import CHART
from tests.chart.test_standard import STANDARD
from tests.support.helm import Values, refusal, render

STANDARD_HPA = {
    **STANDARD,
    "scaling.standard.autoscaler": "hpa",
    "scaling.metric": "cpu",
    "scaling.target": 80,
}
CACHE = {"storage.cache.enabled": True}
CANARY = {**STANDARD, "rollout.standard.canary.name": "v2", "rollout.standard.canary.image.tag": "2"}
SPREAD = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
ALIAS = {"ip": "10.0.0.1", "hostnames": ["store"]}
UNUSABLE_RELEASES = ["7b", "mistral.v1"]
IMPOSSIBLE: list[tuple[Values, str]] = [
    ({"server.modelId": "a/b"}, "both name weights to serve"),
    ({"server.modelDir": "/opt/demo-model"}, "both name weights to serve"),
    ({"storage.uri": ""}, "No value names the weights to serve"),
    ({"server.modelRevision": "main"}, "server.modelRevision belongs to server.modelId"),
    ({"storage.uri": "hf://a/b/c"}, "must be hf://owner/model or hf://owner/model:revision"),
    ({"storage.cache.enabled": True, "storage.uri": "pvc://claim"}, "storage.uri needs no download"),
    (
        {"storage.cache.enabled": True, "storage.cache.accessModes": ["ReadWriteOnce"]},
        "a volume for one node, but scaling.maxReplicas is above 1",
    ),
    ({"hfToken.secretName": "hf", "hfToken.token": "hf_x"}, "both set the token"),
    ({"apiKeys.secretName": "k", "apiKeys.keys": ["a-long-key"]}, "both set the API keys"),
    ({"apiKeys.secretName": "k", "server.apiKeyFile": "/keys"}, "both set the file of the API keys"),
    ({"serviceAccount.create": False}, "serviceAccount.name is empty"),
    (
        {"serviceAccount.create": False, "serviceAccount.name": "sa", "hfToken.secretName": "hf"},
        "cannot attach download credentials",
    ),
    ({"env": [{"name": "MISTRAL_MAX_MODEL_LEN", "value": "1"}]}, "the value server.maxModelLen."),
    ({"env": [{"name": "PORT", "value": "80"}]}, "which only Knative or KServe may set"),
    ({"env": [{"name": "PYTHONPATH", "value": "/x"}]}, "which KServe refuses"),
    ({"resources.limits.cpu": None}, "resources.limits.cpu is missing"),
    ({"resources.limits.memory": "8Gi"}, "is above resources.limits.memory 8Gi"),
    ({"gpu.count": 0}, "set gpu.preset to none"),
    ({"gpu.count": 0, "gpu.preset": "none", "server.dtype": "float16"}, "a CPU computes float16 slowly"),
    ({"scaling.minReplicas": 3}, "scaling.minReplicas 3 is above scaling.maxReplicas 2"),
    ({"scaling.metric": "cpu"}, "Knative scales on concurrency or rps"),
    ({"scaling.target": 161}, "Knative would never scale out"),
    ({"server.maxQueueSize": 1000}, "= 1032 is above 1000"),
    ({"server.requestTimeoutSeconds": 600}, "= 900 is above cluster.maxRevisionTimeoutSeconds 600"),
    ({"server.drainSeconds": 566}, "after which Knative kills the pod"),
    ({"cluster.knativeFlags": []}, "needs the Knative flag kubernetes.podspec-nodeselector"),
    ({**STANDARD, "scaling.minReplicas": 0}, "Standard mode cannot scale to zero"),
    ({**STANDARD, "rollout.canaryTrafficPercent": 0}, "which Standard mode does not have"),
    ({**STANDARD_HPA, "scaling.metric": "concurrency"}, "is not available to an HPA"),
    ({**STANDARD_HPA, "scaling.target": None}, "set the percentage"),
    ({**STANDARD_HPA, "scaling.target": 101}, "a percentage for an HPA"),
    ({**STANDARD, "scaling.metric": "cpu"}, "is not available with KEDA"),
    ({**STANDARD, "scaling.standard.prometheusAddress": ""}, "set scaling.standard.prometheusAddress"),
    ({**STANDARD, "monitoring.podMonitor.enabled": False}, "which needs the server's metrics"),
    ({**STANDARD, "scaling.standard.autoscaler": "none"}, "to the same number"),
    ({"monitoring.prometheusRule.enabled": True}, "needs series that Prometheus does not scrape"),
    ({"networkPolicy.enabled": True, "networkPolicy.egressPorts": []}, "the weights could not be downloaded"),
    ({"image.repository": ""}, "image.repository is empty: build the image"),
    ({"image.repository": "reg/x:1.2"}, "must be registry/path/name in lower case"),
    ({"storage.initializer.image": "kserve//x"}, "must be registry/path/name:tag"),
    ({"fullnameOverride": "null"}, "YAML would not read it as text"),
    (
        {**STANDARD, "fullnameOverride": "a" * 40, "rollout.standard.predictorName": "b" * 12},
        "which has 71 characters, more than the maximum of 63",
    ),
    ({"commonLabels": {"helm.sh/chart": "x"}}, "commonLabels sets helm.sh/chart, which the chart sets itself"),
    ({"podLabels": {"serving.knative.dev/x": "y"}}, "which KServe or Knative sets itself"),
    ({"inferenceService.labels": {"networking.knative.dev/visibility": "all"}}, "Knative accepts only cluster-local"),
    ({"commonLabels": {"a": "b"}, "podLabels": {"a": "c"}}, "podLabels and commonLabels both set a"),
    ({"nodeSelector": {"a b": "x"}}, 'nodeSelector has the key "a b"'),
    ({"nodeSelector": {"zone": "x" * 64}}, "a value is at most 63 letters"),
    ({"podAnnotations": {"a b": "x"}}, 'podAnnotations has the key "a b"'),
    ({"podAnnotations": {"autoscaling.knative.dev/window": "30s"}}, "set scaling.windowSeconds instead"),
    ({"podAnnotations": {"serving.knative.dev/rollout-duration": "10s"}}, "from inferenceService.annotations only"),
    ({"podAnnotations": {"autoscaling.knative.dev/initial-scale": "0"}}, "0 needs allow-zero-initial-scale"),
    ({"podAnnotations": {"serving.knative.dev/creator": "me"}}, "only Knative or KServe may set"),
    ({"podAnnotations": {"queue.sidecar.serving.knative.dev/cpu-resource-limit": "much"}}, "which is not a quantity"),
    ({"storage.uri": "pvc:///x"}, "must be pvc://claim or pvc://claim/path"),
    ({"storage.uri": "oci://image"}, "must name an image after its ://"),
    ({"storage.uri": "s3://bucket"}, "names no file or directory after the host or bucket"),
    ({"storage.uri": "s3://bucket/../x"}, "must not have . or .. in its path"),
    ({"hfToken.secretName": ""}, "is gated and no token is set"),
    (
        {"storage.uri": "", "server.modelId": "mistralai/Mistral-7B-v0.1", "hfToken.secretName": ""},
        "server.modelId mistralai/Mistral-7B-v0.1 is gated",
    ),
    ({"storage.initializer.name": "default"}, "KServe's own ClusterStorageContainer"),
    (
        {"storage.initializer.create": False, "storage.initializer.env": [{"name": "A"}]},
        "env, envFrom and uriPrefixes have no effect",
    ),
    ({**CACHE, "serviceAccount.secrets": ["s3"]}, "where KServe does not read serviceAccount.secrets"),
    ({**CACHE, **CANARY, "rollout.standard.canary.storageUri": "hf://a/b"}, "holds one model at a time"),
    ({"env": [{"name": "A"}, {"name": "A"}]}, "env sets A twice"),
    ({"env": [{"name": "STORAGE_URI", "value": "x"}]}, "which the chart sets from storage.uri"),
    ({"env": [{"name": "PROTOCOL", "value": "v3"}]}, "something else than v1 or v2"),
    ({"storage.initializer.env": [{"name": "HF_TOKEN"}]}, "or beside the value that sets it"),
    ({"resources.limits.cpu": "8000000000"}, "must be a number of CPUs or of thousandths of a CPU"),
    ({"resources.requests.cpu": "0m"}, "resources.requests.cpu 0m must be more than zero"),
    ({"resources.limits.memory": "16000m"}, "must be a size such as 512Mi"),
    ({"storage.cache.size": "0"}, "storage.cache.size 0 must be more than zero"),
    ({"resources.requests.memory": "16", "resources.limits.memory": "24"}, "is its unit missing?"),
    ({"gpu.resourceName": "nvidia.com/mig-3g.20gb"}, "which no A10G offers"),
    ({"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}, "leave the value out, or use Equal"),
    ({"tolerations": [{"value": "b"}]}, "operator Equal, which is the default, without a key"),
    ({"tolerations": [{"key": "a", "tolerationSeconds": 3}]}, "belongs to the effect NoExecute"),
    ({"topologySpreadConstraints": [SPREAD, SPREAD]}, "topologySpreadConstraints has zone ScheduleAnyway twice"),
    ({"hostAliases": [ALIAS, ALIAS]}, "hostAliases has 10.0.0.1 twice"),
    ({"securityContext.runAsUser": 0}, "securityContext has runAsNonRoot and runAsUser 0"),
    ({"securityContext.seccompProfile": {"type": "Localhost"}}, "Localhost needs one"),
    ({"securityContext.capabilities.add": ["SYS_ADMIN"]}, "adds SYS_ADMIN and has allowPrivilegeEscalation false"),
    ({"extraVolumes": [{"name": "tmp", "emptyDir": {}}]}, "has the name tmp, which the chart or KServe uses"),
    ({"extraVolumes": [{"name": "ca", "emptyDir": {}}]}, "which no entry of extraVolumeMounts mounts"),
    ({"extraVolumeMounts": [{"name": "ca", "mountPath": "/ca"}]}, "which is not in extraVolumes"),
    ({"extraVolumeMounts": [{"name": "ca", "mountPath": "/tmp/"}]}, "at /tmp/, which is already in use"),
    ({"podDisruptionBudget.enabled": True}, "has no effect with fewer than two replicas"),
    (
        {"podDisruptionBudget": {"enabled": True, "maxUnavailable": 2}, "scaling.minReplicas": 2},
        "lets a drain evict all of the 2 replicas",
    ),
    ({"scaling.metric": "rps"}, "scaling.metric is rps and scaling.target is not set"),
    ({"rollout.standard.canary.name": "v2"}, "rollout.standard is for Standard mode"),
    ({**CANARY, "rollout.standard.predictorName": "v2"}, "KServe needs different names"),
    ({**CANARY, "rollout.standard.canary.minReplicas": 2}, "canary.minReplicas 2 is above scaling.minReplicas 1"),
    ({**CANARY, "rollout.standard.canary.image.tag": ""}, "has neither another image nor another storageUri"),
    (
        {**CANARY, "storage.uri": "", "server.modelId": "a/b"},
        "accepts a canary only for a predictor with a storage URI",
    ),
    ({"networkPolicy.enabled": True, "networkPolicy.ingressNamespaces": []}, "does not list knative-serving"),
    ({"logger.enabled": True}, "logger.url, which is empty"),
    ({"server.maxRequestsPerKey": 4}, "limits the requests of an API key, but the server needs no keys"),
    (
        {"relay.enabled": True, "relay.webhookHosts": ["hooks.example.com"]},
        "relay.webhookSecretName is not, but the relay must sign webhooks",
    ),
    ({"relay.enabled": True, "apiKeys.secretName": "keys"}, "relay.upstreamKeySecretName is not set"),
    (
        {"relay.enabled": True, "server.apiKeyFile": "/keys/file", "relay.upstreamKeySecretName": "upstream"},
        "but the relay would accept requests without a key",
    ),
]


@pytest.mark.parametrize(("values", "words"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_with_a_sentence(values: Values, words: str) -> None:
    assert words in refusal(values)


@pytest.mark.parametrize("release", UNUSABLE_RELEASES)
def test_a_release_whose_name_no_inference_service_can_have_needs_another(release: str) -> None:
    assert "choose another release name, or set fullnameOverride" in refusal({}, release=release)
    assert ("InferenceService", "mistral") in render({"fullnameOverride": "mistral"}, release=release)


def sentences() -> list[str]:
    """Return the sentences of the templates, as regular expressions."""
    texts = "\n".join(path.read_text() for path in sorted(CHART.glob("templates/_refusals-*.tpl")))
    lines = re.findall(r"(?m)^- (.*)$", texts)
    return [".*".join(re.escape(part) for part in re.split(r"{{.*?}}(?!\\\"|\")", line)) for line in lines]


@cache
def refusals() -> str:
    named = [refusal({}, release=release) for release in UNUSABLE_RELEASES]
    return "\n".join([*named, *(refusal(values) for values, _ in IMPOSSIBLE)])


@pytest.mark.parametrize("sentence", sentences())
def test_every_sentence_has_its_test(sentence: str) -> None:
    assert re.search(sentence, refusals())


def test_all_problems_are_told_at_once() -> None:
    found = refusal({"storage.uri": "", "gpu.count": 0, "scaling.metric": "cpu"})
    assert "the weights to serve" in found
    assert "gpu.preset" in found
    assert "scaling.metric" in found
