"""The InferenceService that the chart renders: its image, its resources, its scaling and its deadlines."""

from __future__ import annotations

import subprocess

import pytest

from charts.render_manifests import CHART, IMAGE, scenarios, tool
from tests.support.helm import (
    SCENARIOS,
    container,
    environment,
    helm_test_pod,
    inference_service,
    predictor,
    render,
)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_helm_lint_finds_nothing_in_any_scenario(scenario: str) -> None:
    command = [tool("helm"), "lint", "--strict", str(CHART), "--set", f"image.repository={IMAGE}"]
    command += ["--values", str(scenarios()[scenario])]
    lint = subprocess.run(command, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout
    assert "WARNING" not in lint.stdout


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("mistral-7b", "mistral-7b"),
        ("chat", "chat-mistral-7b"),
        ("a" * 38 + "--" + "b" * 13, "a" * 38),
    ],
)
def test_names_follow_the_release(release: str, name: str) -> None:
    assert ("InferenceService", name) in render(release=release)


def test_defaults_ask_for_one_a10g_and_scale_to_zero() -> None:
    service = inference_service()
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Knative"
    assert service["spec"]["predictor"]["minReplicas"] == 0
    assert service["spec"]["predictor"]["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A10G"}
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container()["resources"]["requests"]["nvidia.com/gpu"] == "1"


def test_memory_is_never_left_to_kserve_which_would_give_2gi() -> None:
    assert container()["resources"]["requests"]["memory"] == "16Gi"
    assert container()["resources"]["limits"]["memory"] == "24Gi"


def test_the_image_is_the_charts_app_version_unless_a_tag_is_given() -> None:
    assert container()["image"] == f"{IMAGE}:0.1.0"
    assert container({"image.tag": "7"})["image"] == f"{IMAGE}:7"


def test_a_digest_is_written_beside_the_tag_that_people_read() -> None:
    digest = "sha256:" + "0" * 64
    assert container({"image.digest": digest})["image"] == f"{IMAGE}@{digest}"
    assert container({"image.tag": "7", "image.digest": digest})["image"] == f"{IMAGE}:7@{digest}"


def test_no_canary_is_written_unless_one_is_asked_for() -> None:
    assert "canaryTrafficPercent" not in predictor()


@pytest.mark.parametrize("percent", [0, 10, 100])
def test_the_canary_gets_its_percent_zero_included(percent: int) -> None:
    assert predictor({"rollout.canaryTrafficPercent": percent})["canaryTrafficPercent"] == percent


def test_each_revision_has_a_host_of_its_own() -> None:
    assert inference_service()["metadata"]["annotations"]["serving.kserve.io/enable-tag-routing"] == "true"


def test_a_replica_is_given_as_many_requests_as_the_server_has_places_for() -> None:
    assert predictor()["containerConcurrency"] == 32 + 128
    assert predictor({"server.maxBatchSize": 8, "server.maxQueueSize": 0})["containerConcurrency"] == 8


def test_it_scales_out_when_requests_would_wait() -> None:
    assert predictor({"server.maxBatchSize": 8})["scaleTarget"] == 8
    assert predictor({"scaling.target": 4})["scaleTarget"] == 4


def test_knative_cuts_after_the_server_has_ended_the_request_itself() -> None:
    values = {"server.requestTimeoutSeconds": 100, "scaling.coldStartSeconds": 200}
    assert predictor(values)["timeout"] == 300
    assert environment(values)["MISTRAL_REQUEST_TIMEOUT_SECONDS"] == "100"


def test_the_startup_probe_gives_up_with_knative() -> None:
    values = {"scaling.progressDeadlineSeconds": 905, "probes.startup.periodSeconds": 10}
    assert predictor(values)["annotations"]["serving.knative.dev/progress-deadline"] == "905s"
    assert container(values)["startupProbe"]["failureThreshold"] == 91


def test_the_model_has_one_name_in_flags_and_probes() -> None:
    named = container({"modelName": "assistant"})
    assert named["args"] == ["--model_name=assistant"]
    assert named["startupProbe"]["httpGet"]["path"] == "/v1/models/assistant"
    assert named["readinessProbe"]["httpGet"]["path"] == "/v1/models/assistant"


def test_zero_and_false_are_values() -> None:
    values = {
        "scaling.scaleDownDelaySeconds": 0,
        "scaling.podRetentionSeconds": 0,
        "scaling.burstCapacity": 0,
        "rollout.tagRouting": False,
        "server.playground": False,
        "server.maxQueueSize": 0,
    }
    annotations = predictor(values)["annotations"]
    assert annotations["autoscaling.knative.dev/scale-down-delay"] == "0s"
    assert annotations["autoscaling.knative.dev/scale-to-zero-pod-retention-period"] == "0s"
    assert annotations["autoscaling.knative.dev/target-burst-capacity"] == "0"
    own = inference_service(values)["metadata"]["annotations"]
    assert own["serving.kserve.io/enable-tag-routing"] == "false"
    assert environment(values)["MISTRAL_PLAYGROUND"] == "false"
    assert environment(values)["MISTRAL_MAX_QUEUE_SIZE"] == "0"


def test_the_inference_service_can_wait_until_the_cache_is_full() -> None:
    kinds = {kind for kind, _ in render({"inferenceService.create": False}, scenario="pvc-cache")}
    assert kinds == {"ServiceAccount", "PersistentVolumeClaim", "Job", "ClusterStorageContainer"}


def test_extra_objects_may_be_yaml_or_templates() -> None:
    text = "kind: ConfigMap\nmetadata: {name: '{{ .Release.Name }}-text'}"
    yaml = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "yaml"}}
    objects = render({"extraObjects": [text, yaml]})
    assert {("ConfigMap", "mistral-7b-text"), ("ConfigMap", "yaml")} <= objects.keys()


def test_helm_test_asks_the_served_model_from_the_servers_own_image() -> None:
    pod = helm_test_pod()
    [asking] = pod["spec"]["containers"]
    assert asking["image"] == container()["image"]
    assert "http://mistral-7b-predictor.mistral.svc" in asking["args"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert ("Pod", "mistral-7b-test") not in render()
