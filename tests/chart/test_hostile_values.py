"""Odd values: each is refused by Helm with a sentence, or what it renders is what a cluster takes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chart.test_standard import STANDARD
from tests.support.admission import objections
from tests.support.helm import Values, refusal, render

LONG = "x" * 64
NULL: Any = None
DIGEST = "sha256:" + "0" * 64
FLAGS = [f"kubernetes.podspec-{name}" for name in ("nodeselector", "tolerations", "affinity", "securitycontext")]
NODE = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}


def affinity(**node: Any) -> Values:
    return {"affinity": {"nodeAffinity": node}, "cluster.knativeFlags": FLAGS}


REFUSED: list[Values] = [
    # Names and images
    {"image.repository": "reg.example/x/"},
    {"image.repository": "reg.example/a/../b"},
    {"image.repository": "reg.example/x:"},
    {"image.repository": "https://reg.example/x"},
    {"image.repository": "reg.example/Üx"},
    {"image.repository": NULL},
    {"image.tag": "a b"},
    {"image.tag": "x" * 129},
    {"image.digest": "sha512:" + "0" * 128},
    {"image.pullSecrets": ["a", "a"]},
    {"image.pullSecrets": [""]},
    {"image.pullSecrets": {"name": "a"}},
    {"image": NULL},
    {"image": []},
    {"fullnameOverride": "-a"},
    {"fullnameOverride": "a" * 41},
    {"nameOverride": "Mistral"},
    {"modelName": "a/b"},
    {"modelName": ""},
    {**STANDARD, "fullnameOverride": "a" * 40, "rollout.standard.predictorName": "stable-model"},
    # Sections and types
    {"scaling": NULL},
    {"storage.cache": NULL},
    {"networkPolicy": []},
    {"monitoring": "on"},
    {"env": "A=b"},
    {"env": {"A": "b"}},
    {"nodeSelector": ["zone=a"]},
    {"tolerations": {"key": "a"}},
    {"podAnnotations": {"a": 1}},
    {"podAnnotations": {"a": True}},
    {"podAnnotations": {"a": NULL}},
    {"extraObjects": [{"kind": "ConfigMap"}]},
    {"extraObjects": {"kind": "ConfigMap"}},
    # Labels and annotations
    {"inferenceService.labels": {"team": "a b"}},
    {"inferenceService.labels": {"team": "ü"}},
    {"inferenceService.labels": {LONG: "a"}},
    {"inferenceService.labels": {"app.kubernetes.io/instance": "x"}},
    {"inferenceService.annotations": {"serving.kserve.io/deploymentMode": "Standard"}},
    {"inferenceService.annotations": {"a/b/c": "x"}},
    {"inferenceService.annotations": {"serving.knative.dev/rollout-duration": "10"}},
    {"podAnnotations": {"autoscaling.knative.dev/min-scale": "5"}},
    {"podAnnotations": {"autoscaling.knative.dev/minScale": "5"}},
    {"podAnnotations": {"autoscaling.knative.dev/class": "hpa"}},
    {"podAnnotations": {"features.knative.dev/http-full-duplex": "Disabled"}},
    {"podAnnotations": {"autoscaling.knative.dev/panic-window-percentage": "0"}},
    {"podLabels": {"serving.kserve.io/inferenceservice": "other"}},
    {"commonLabels": {"": "x"}},
    {"serviceAccount.annotations": {"bad key": "x"}},
    {"monitoring.podMonitor.labels": {"helm.sh/chart": "x"}},
    # Environment
    {"env": [{"name": "1A"}]},
    {"env": [{"name": "A B"}]},
    {"env": [{"name": "A", "value": 1}]},
    {"env": [{"name": "HF_HUB_OFFLINE", "value": "0"}]},
    {"env": [{"name": "PROTOCOL", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]},
    {"env": [{"name": "A", "valueFrom": {}}]},
    {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "Bad Name", "key": "a"}}}]},
    {"storage.initializer.env": [{"name": "A"}, {"name": "A"}]},
    {"storage.initializer.envFrom": [{"prefix": "A_"}]},
    # Quantities
    {"resources": NULL},
    {"resources.limits": NULL},
    {"resources.requests": NULL},
    {"resources.requests.cpu": "-1"},
    {"resources.requests.cpu": "0"},
    {"resources.requests.cpu": 0},
    {"resources.requests.cpu": "1e3"},
    {"resources.requests.cpu": "four"},
    {"resources.limits.cpu": "1Gi"},
    {"resources.limits.memory": "24GB"},
    {"resources.limits.memory": "24 Gi"},
    {"resources.limits.memory": "99999999999999Ti"},
    {"resources.limits.memory": "-24Gi"},
    {"resources.limits": {"amd.com/gpu": "1"}},
    {"resources.limits.ephemeral-storage": "1Gi"},
    {"storage.initializer.resources.limits": NULL},
    {"storage.initializer.resources.limits.memory": "1Gi"},
    {"shmSize": ""},
    {"tmpSize": "0"},
    {"hubCacheSize": "40G i"},
    {"storage.cache.size": 0},
    # Placement
    {"nodeSelector": {"zone": 1}},
    {"nodeSelector": {"/zone": "a"}},
    {"tolerations": [{"operator": "Sometimes"}]},
    {"tolerations": [{"key": "bad key", "operator": "Exists"}]},
    {"tolerations": [{"key": "a", "operator": "Exists", "effect": "Never"}]},
    affinity(requiredDuringSchedulingIgnoredDuringExecution={"nodeSelectorTerms": []}),
    affinity(preferredDuringSchedulingIgnoredDuringExecution=[{"weight": 101, "preference": NODE}]),
    affinity(preferredDuringSchedulingIgnoredDuringExecution=[{"weight": 1, "preference": {"matchLabels": {}}}]),
    {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"namespaces": []}]}}},
    {"hostAliases": [{"ip": "10.0.0.256", "hostnames": ["a"]}]},
    {"hostAliases": [{"ip": "10.0.0.1", "hostnames": []}]},
    {"gpu.resourceName": "nvidia.com/"},
    {"gpu.count": "1"},
    {"runtimeClassName": "Bad Name"},
    # Security
    {"securityContext.privileged": True},
    {"securityContext.runAsUser": -1},
    {"securityContext.runAsUser": 2**31},
    {"securityContext.capabilities.add": ["NET_BIND_SERVICE"]},
    {"podSecurityContext": {"runAsUser": 0, "runAsNonRoot": True}, "cluster.knativeFlags": FLAGS},
    {"podSecurityContext": {"sysctls": []}},
    # Storage and secrets
    {"storage.uri": "file:///models"},
    {"storage.uri": "hf://a/b@main"},
    {"storage.uri": "hf://a/b:main/x"},
    {"storage.uri": "hf://a/b c"},
    {"storage.uri": "pvc://Claim"},
    {"storage.uri": "oci+native://"},
    {"storage.uri": "s3://"},
    {"storage.uri": NULL},
    {"storage.initializer.uriPrefixes": ["hf"]},
    {"storage.cache.keepVersions": -1},
    {"hfToken.secretName": "hf..token"},
    {"hfToken.token": "hf x", "hfToken.secretName": ""},
    {"apiKeys.keys": ["same-key-1", "same-key-1"]},
    {"apiKeys.keys": ["schlüssel-1"]},
    {"serviceAccount.name": "a_b"},
    # Volumes
    {"extraVolumes": [{"name": "a", "emptyDir": {}, "secret": {"secretName": "b"}}]},
    {"extraVolumes": [{"name": "a"}]},
    {"extraVolumes": [{"name": "kserve-pvc-source", "emptyDir": {}}]},
    {"extraVolumeMounts": [{"name": "a", "mountPath": "relative"}]},
    {"extraVolumeMounts": [{"name": "a", "mountPath": "/a/../../etc"}]},
    # Scaling, time and probes
    {"scaling.minReplicas": 1.5},
    {"scaling.maxReplicas": 2**31},
    {"scaling.target": 0},
    {"scaling.burstCapacity": -2},
    {"scaling.windowSeconds": "60s"},
    {"scaling.windowSeconds": 3601},
    {"scaling.progressDeadlineSeconds": 10**9},
    {"server.requestTimeoutSeconds": 86400},
    {"server.drainSeconds": -1},
    {"cluster.maxRevisionTimeoutSeconds": 0},
    {"cluster.knativeFlags": ["nodeselector"]},
    {"probes.liveness.successThreshold": 2},
    {"probes.readiness.periodSeconds": 0},
    {"probes.startup.timeoutSeconds": NULL},
    {"rollout.canaryTrafficPercent": -1},
    {"rollout.canaryTrafficPercent": "10%"},
    {"podDisruptionBudget.maxUnavailable": "50%"},
    {**STANDARD, "scaling.standard.prometheusAddress": "prometheus:9090"},
    # Network and monitoring
    {"networkPolicy.egressPorts": [0]},
    {"networkPolicy.egressPorts": ["https"]},
    {"networkPolicy.ingressNamespaces": [LONG]},
    {"networkPolicy.extraIngress": [{}]},
    {"networkPolicy.extraIngress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}]},
    {"networkPolicy.extraEgress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}]},
    {"networkPolicy.extraEgress": [{"ports": [{"port": 70000}]}]},
    {"monitoring.podMonitor.intervalSeconds": 0},
    {"monitoring.prometheusRule.errorRatio": "5%"},
    {"logger": {"enabled": True, "url": "broker"}},
    {"logger.metadataHeaders": ["authorization"]},
    {"test.timeoutSeconds": 0},
]

ALL = {"monitoring.podMonitor.enabled": True, "networkPolicy.enabled": True, "storage.cache.enabled": True}
WORKING: list[Values] = [
    {"image.repository": "localhost:5000/a__b/c-d.e", "image.tag": "1.0_x", "image.digest": DIGEST},
    {"image.repository": "mistral"},
    {"image.pullSecrets": ["123", "true"]},
    {"hfToken.secretName": "123", "apiKeys.secretName": "null"},
    {"serviceAccount.create": False, "serviceAccount.name": "0123", "hfToken": {"secretName": "", "required": False}},
    {"serviceAccount.secrets": ["hf-token", "s3"]},
    {"fullnameOverride": "a"},
    {"modelName": "Mistral.7B_v0-3"},
    {"inferenceService.labels": {"team": "", "example.com/Cost_Center": "A.b-c_1"}},
    {"inferenceService.labels": {"networking.knative.dev/visibility": "cluster-local"}},
    {"inferenceService.annotations": {"serving.knative.dev/rollout-duration": "10m", "note": 'a "b": #{{ .x }}'}},
    {"podAnnotations": {"autoscaling.knative.dev/initial-scale": "0"}, "cluster.allowZeroInitialScale": True},
    {"podAnnotations": {"queue.sidecar.serving.knative.dev/cpu-resource-limit": "500m", "on": "yes"}},
    {"podLabels": {"sidecar.istio.io/inject": "false"}},
    {**ALL, "commonLabels": {"example.com/team": "nlp", "on": "true", "n": "1"}},
    {"env": [{"name": "A", "value": ""}, {"name": "B", "value": "${A} $(A) ü \n x: y"}]},
    {"env": [{"name": "PROTOCOL", "value": "v1"}]},
    {"env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "a", "key": "b.c_d", "optional": True}}}]},
    {"resources.requests.cpu": "1500m", "resources.limits.cpu": 2},
    {"resources.requests.memory": 17179869184, "resources.limits.memory": "17179869184"},
    {"resources.limits.ephemeral-storage": "20Gi", "shmSize": "0.5Gi", "tmpSize": 1073741824},
    {"nodeSelector": {"zone": "", "kubernetes.io/os": "linux"}},
    {"tolerations": [{"operator": "Exists"}, {"key": "a", "effect": "NoExecute", "tolerationSeconds": 0}]},
    affinity(requiredDuringSchedulingIgnoredDuringExecution={"nodeSelectorTerms": [NODE]}),
    affinity(preferredDuringSchedulingIgnoredDuringExecution=[{"weight": 1, "preference": NODE}]),
    {"podSecurityContext": {"fsGroup": 1000, "fsGroupChangePolicy": "Always"}, "cluster.knativeFlags": FLAGS},
    {"securityContext.seccompProfile": {"type": "Localhost", "localhostProfile": "profiles/a.json"}},
    {"storage.uri": "hf://a/b", "storage.initializer.ignorePatterns": []},
    {"storage.uri": "pvc://claim.x/path/to"},
    {"storage.uri": "oci+fetch://reg.example:5000/a/b:1"},
    {"storage.uri": "https://host.example/models/m.tar.gz?sig=a%20b"},
    {**ALL, "storage.cache": {"storageClassName": "", "accessModes": ["ReadWriteOnce"]}, "scaling.maxReplicas": 1},
    {"extraVolumes": [{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}],
     "extraVolumeMounts": [{"name": "t", "mountPath": "/var/run/t/"}]},
    {"gpu.resourceName": "nvidia.com/mig-2g.24gb", "gpu.preset": "none", "nodeSelector": {"gpu": "h200"}},
    {"scaling.minReplicas": 0, "scaling.burstCapacity": 0, "scaling.metric": "rps", "scaling.target": 4},
    {"scaling.minReplicas": 2, "podDisruptionBudget.enabled": True},
    {"rollout.canaryTrafficPercent": 100},
    {**ALL, "networkPolicy.egressPorts": [443, 80], "networkPolicy.extraIngress": [{"from": [{"podSelector": {}}]}]},
    {**ALL, "networkPolicy.extraEgress": [{"to": [{"ipBlock": {"cidr": "fd00::/8"}}], "ports": [{"port": 80}]}]},
    {**ALL, "networkPolicy.extraEgress": [{"ports": [{"port": 8000, "endPort": 9000, "protocol": "UDP"}]}]},
    {"logger": {"enabled": True, "url": "http://broker-ingress.knative-eventing/ns/default"}},
    {**STANDARD, "rollout.standard.predictorName": "v2", "podDisruptionBudget.enabled": True, "scaling.minReplicas": 2},
    {"extraObjects": ["", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n"]},
]  # fmt: skip


@pytest.mark.parametrize("values", REFUSED, ids=str)
def test_a_hostile_value_is_refused_and_named(values: Values) -> None:
    said = refusal(values)
    named = [part for path in values for part in (path, path.rsplit(".", 1)[-1])]
    assert any(part in said for part in named), said
    assert "nil pointer" not in said
    assert "YAML parse error" not in said


@pytest.mark.parametrize("values", WORKING, ids=str)
def test_an_odd_value_renders_what_a_cluster_takes(values: Values) -> None:
    assert not objections(list(render(values).values()))
