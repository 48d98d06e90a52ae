"""What Knative 1.21 lets through: the rules of its validation, applied to the pod that KServe makes of ours.

Knative refuses a pod only when KServe's controller creates the revision, long after `kubectl apply` said yes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from charts.render_manifests import CHART, MANIFESTS, scenarios
from tests.support.helm import SCENARIOS, container, inference_service, predictor

KNATIVE = [s for s in SCENARIOS if not s.startswith("standard")]

FLAGGED = {
    "nodeSelector": "nodeselector",
    "tolerations": "tolerations",
    "affinity": "affinity",
    "runtimeClassName": "runtimeclassname",
    "securityContext": "securitycontext",
    "topologySpreadConstraints": "topologyspreadconstraints",
    "priorityClassName": "priorityclassname",
    "schedulerName": "schedulername",
    "hostAliases": "hostaliases",
    "dnsPolicy": "dnspolicy",
    "dnsConfig": "dnsconfig",
    "initContainers": "init-containers",
    "shareProcessNamespace": "shareprocessnamespace",
}
"""Fields of the pod that a flag of config-features must allow."""
FREE = {
    "serviceAccountName",
    "automountServiceAccountToken",
    "enableServiceLinks",
    "imagePullSecrets",
    "containers",
    "volumes",
}
"""Fields of the pod that need no flag."""
KSERVE = {
    "annotations",
    "minReplicas",
    "maxReplicas",
    "scaleMetric",
    "scaleTarget",
    "containerConcurrency",
    "canaryTrafficPercent",
    "timeout",
    "storageContainerName",
}
"""Fields of the predictor that never reach the pod."""
CONTAINER = {
    "name",
    "image",
    "imagePullPolicy",
    "args",
    "ports",
    "env",
    "resources",
    "startupProbe",
    "readinessProbe",
    "livenessProbe",
    "securityContext",
    "volumeMounts",
}
"""Fields of the container in use; among those that no flag allows are lifecycle and a second port."""
RESERVED_PORTS = {8008, 8012, 8013, 8022, 8112, 9090, 9091}


def declared_flags(scenario: str) -> set[str]:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    own = yaml.safe_load(scenarios()[scenario].read_text())
    return set({**defaults["cluster"], **own.get("cluster", {})}["knativeFlags"])


@pytest.mark.parametrize("scenario", KNATIVE)
def test_the_pod_needs_only_the_declared_flags(scenario: str) -> None:
    fields = predictor(scenario=scenario).keys() - FREE - KSERVE
    assert {f"kubernetes.podspec-{FLAGGED[field]}" for field in fields} <= declared_flags(scenario)


def test_the_patch_for_the_cluster_enables_what_the_defaults_declare() -> None:
    patch = yaml.safe_load((MANIFESTS / "cluster" / "config-features.yaml").read_text())
    assert {key for key, value in patch["data"].items() if value == "enabled"} == declared_flags("gfd")


@pytest.mark.parametrize("scenario", KNATIVE)
def test_no_volume_needs_a_flag(scenario: str) -> None:
    for volume in predictor(scenario=scenario)["volumes"]:
        assert volume.keys() - {"name"} <= {"emptyDir", "secret", "configMap", "projected"}


@pytest.mark.parametrize("scenario", KNATIVE)
def test_the_container_has_one_port_that_knative_does_not_keep_for_itself(scenario: str) -> None:
    [port] = container(scenario=scenario)["ports"]
    assert port["containerPort"] not in RESERVED_PORTS
    assert port["name"] == "http1"


@pytest.mark.parametrize("scenario", KNATIVE)
def test_the_container_has_no_field_that_knative_refuses(scenario: str) -> None:
    assert container(scenario=scenario).keys() <= CONTAINER


@pytest.mark.parametrize("scenario", KNATIVE)
def test_no_variable_is_reserved_or_read_from_the_pod(scenario: str) -> None:
    for variable in container(scenario=scenario)["env"]:
        assert variable["name"] not in {"PORT", "K_SERVICE", "K_REVISION", "K_CONFIGURATION"}
        assert variable.get("valueFrom", {}).keys() <= {"secretKeyRef", "configMapKeyRef"}


@pytest.mark.parametrize("scenario", KNATIVE)
def test_probes_use_the_containers_own_port_and_give_a_period(scenario: str) -> None:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container(scenario=scenario)[name]
        assert probe["httpGet"]["port"] == 8080
        assert probe["periodSeconds"] > 0  # 0 asks Knative for its aggressive probing, which refuses the rest


@pytest.mark.parametrize("scenario", KNATIVE)
def test_the_timeout_is_within_what_the_scenario_says_of_its_cluster(scenario: str) -> None:
    own = yaml.safe_load(scenarios()[scenario].read_text()).get("cluster", {})
    assert predictor(scenario=scenario)["timeout"] <= own.get("maxRevisionTimeoutSeconds", 600)


def test_the_patch_for_the_cluster_allows_the_longest_timeout_of_a_scenario() -> None:
    patch = yaml.safe_load((MANIFESTS / "cluster" / "config-defaults.yaml").read_text())
    allowed = int(patch["data"]["max-revision-timeout-seconds"])
    assert max(predictor(scenario=s)["timeout"] for s in KNATIVE) <= allowed


@pytest.mark.parametrize("scenario", KNATIVE)
def test_scaling_has_one_place_and_knatives_spelling(scenario: str) -> None:
    service = inference_service(scenario=scenario)
    annotations = {**service["metadata"]["annotations"], **service["spec"]["predictor"]["annotations"]}
    for refused in ("minScale", "min-scale", "maxScale", "max-scale", "initial-scale"):
        assert f"autoscaling.knative.dev/{refused}" not in annotations
    for name, seconds in durations(annotations):
        assert 0 <= seconds <= (3600 if name.startswith("autoscaling") else 86400), name


def durations(annotations: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in annotations.items():
        if name.rsplit("/", 1)[-1] in {
            "window",
            "scale-down-delay",
            "scale-to-zero-pod-retention-period",
            "progress-deadline",
        }:
            assert value.endswith("s"), "Go's durations have a unit"
            yield name, int(value.removesuffix("s"))


@pytest.mark.parametrize("scenario", KNATIVE)
def test_queue_proxy_keeps_the_request_body_open_while_the_answer_streams(scenario: str) -> None:
    """Without full duplex it cut 21 of 11,554 streams on a real cluster, and none of 10,687 with it."""
    annotations = predictor(scenario=scenario)["annotations"]
    assert annotations["features.knative.dev/http-full-duplex"] == "Enabled"
