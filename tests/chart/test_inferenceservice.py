"""What the chart renders: the InferenceService, its figures, its place, its rights."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from kserve.model_server import parser

from charts.render_manifests import CHART, IMAGE, scenarios, tool
from charts.render_server import chart_default
from model_server.settings import Settings, flag_fields
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


# ---- A revision is a model reload on a second GPU: only what must makes one ----


@pytest.fixture(scope="module")
def bumped_chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same chart, one version later."""
    chart = tmp_path_factory.mktemp("bumped") / "mistral-7b"
    shutil.copytree(CHART, chart)
    file = chart / "Chart.yaml"
    file.write_text(file.read_text().replace("version: 0.1.0", "version: 9.9.9", 1))
    return chart


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_chart_version_bump_makes_no_new_revision(scenario: str, bumped_chart: Path) -> None:
    bumped = inference_service(scenario=scenario, chart=bumped_chart)
    assert bumped == inference_service(scenario=scenario)


def test_a_chart_version_bump_does_not_fill_the_cache_again(bumped_chart: Path) -> None:
    before, after = render(scenario="pvc-cache"), render(scenario="pvc-cache", chart=bumped_chart)
    assert before.keys() == after.keys()
    [job] = [key for key in before if key[0] == "Job"]
    assert before[job]["spec"] == after[job]["spec"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_versioned_reaches_the_pods(scenario: str) -> None:
    service = inference_service(scenario=scenario)
    assert service["metadata"]["labels"].keys() == {"app.kubernetes.io/name", "app.kubernetes.io/instance"}
    assert not any("helm.sh" in key for key in service["metadata"]["annotations"])
    for (kind, _), o in render(scenario=scenario).items():
        if kind == "Job":
            labels = o["spec"]["template"]["metadata"]["labels"]
            assert not {"helm.sh/chart", "app.kubernetes.io/version"} & labels.keys()


# ---- Image and canary ----


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


# ---- Figures that depend on each other ----


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


def test_a_drain_lasts_as_long_as_a_request_may_unless_another_is_given() -> None:
    assert environment({"server.requestTimeoutSeconds": 100})["MISTRAL_DRAIN_SECONDS"] == "100"
    assert environment({"server.drainSeconds": 0})["MISTRAL_DRAIN_SECONDS"] == "0"


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


def test_a_setting_at_the_servers_own_default_is_not_passed_so_that_an_older_image_starts() -> None:
    passed = {name for name in environment() if name.startswith("MISTRAL_")}
    assert passed == {"MISTRAL_DRAIN_SECONDS", "MISTRAL_REQUEST_TIMEOUT_SECONDS", "MISTRAL_LOG_FORMAT"}
    assert "MISTRAL_LOG_FORMAT" not in environment({"server.logFormat": "text"})


def test_a_setting_that_differs_from_the_servers_own_default_is_passed() -> None:
    values = {"server.maxBatchSize": 8, "server.corsOrigins": ["https://a.example", "https://b.example"]}
    assert environment(values)["MISTRAL_MAX_BATCH_SIZE"] == "8"
    assert environment(values)["MISTRAL_CORS_ORIGINS"] == "https://a.example,https://b.example"


def test_a_server_started_by_the_chart_has_the_settings_of_the_values() -> None:
    variables = {name: value for name, value in environment().items() if value is not None}
    settings = Settings.parse(container()["args"], variables, parser)
    values = {name: chart_default(name) for name in flag_fields()}
    found = {name: getattr(settings, name) for name in flag_fields()}
    assert found | {"cors_origins": []} == values | {"drain_seconds": values["request_timeout_seconds"]}


def test_large_numbers_keep_their_digits() -> None:
    assert environment({"server.maxRequestBytes": 104857600})["MISTRAL_MAX_REQUEST_BYTES"] == "104857600"


# ---- Placement ----


@pytest.mark.parametrize(
    ("preset", "selector"),
    [
        ("gfd", {"nvidia.com/gpu.product": "NVIDIA-A10G"}),
        ("eks", {"node.kubernetes.io/instance-type": "g5.2xlarge"}),
        ("karpenter", {"karpenter.k8s.aws/instance-gpu-name": "a10g"}),
        ("eks-auto", {"eks.amazonaws.com/instance-gpu-name": "a10g"}),
    ],
)
def test_a_preset_finds_an_a10g(preset: str, selector: dict[str, str]) -> None:
    assert predictor({"gpu.preset": preset})["nodeSelector"] == selector


def test_no_preset_leaves_the_selector_to_the_user() -> None:
    assert "nodeSelector" not in predictor({"gpu.preset": "none"})
    own = {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    assert predictor({"gpu.preset": "none", "nodeSelector": own})["nodeSelector"] == own


def test_a_selector_of_the_users_joins_the_preset_and_wins_over_it() -> None:
    own = {"nvidia.com/gpu.product": "NVIDIA-A10G-SHARED", "zone": "a"}
    assert predictor({"nodeSelector": own})["nodeSelector"] == own


def test_the_gpu_taint_is_always_tolerated_and_others_are_added() -> None:
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    sku = {"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"}
    assert predictor()["tolerations"] == [gpu]
    assert predictor({"tolerations": [sku]})["tolerations"] == [gpu, sku]


@pytest.mark.parametrize(
    ("resource", "taint"),
    [
        ("nvidia.com/mig-3g.20gb", "nvidia.com/gpu"),
        ("nvidia.com/gpu.shared", "nvidia.com/gpu"),
        ("amd.com/gpu", "amd.com/gpu"),
    ],
)
def test_a_slice_of_a_gpu_is_asked_for_by_its_name_and_tolerated_by_the_whole_ones(resource: str, taint: str) -> None:
    values = {"gpu.resourceName": resource, "gpu.preset": "none"}
    assert container(values)["resources"]["limits"][resource] == "1"
    assert "nvidia.com/gpu" not in container(values)["resources"]["limits"]
    assert [t["key"] for t in predictor(values)["tolerations"]] == [taint]


def test_a_cpu_demo_asks_for_nothing_of_a_gpu_node() -> None:
    demo = predictor(scenario="minimal-cpu")
    assert not {"nodeSelector", "tolerations"} & demo.keys()
    assert "nvidia.com/gpu" not in demo["containers"][0]["resources"]["limits"]


# ---- Security ----


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_server_runs_without_root_capabilities_or_a_writable_root(scenario: str) -> None:
    context = container(scenario=scenario)["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == 1000
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_pod_has_no_kubernetes_token_and_no_service_links(scenario: str) -> None:
    assert predictor(scenario=scenario)["automountServiceAccountToken"] is False
    assert predictor(scenario=scenario)["enableServiceLinks"] is False


# ---- The rest ----


def test_the_inference_service_can_wait_until_the_cache_is_full() -> None:
    kinds = {kind for kind, _ in render({"inferenceService.create": False}, scenario="pvc-cache")}
    assert kinds == {"ServiceAccount", "PersistentVolumeClaim", "Job", "ClusterStorageContainer"}


def test_extra_objects_may_be_yaml_or_templates() -> None:
    text = "kind: ConfigMap\nmetadata: {name: '{{ .Release.Name }}-text'}"
    yaml = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "yaml"}}
    objects = render({"extraObjects": [text, yaml]})
    assert {("ConfigMap", "mistral-7b-text"), ("ConfigMap", "yaml")} <= objects.keys()


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


def test_helm_test_asks_the_served_model_from_the_servers_own_image() -> None:
    pod = helm_test_pod()
    [asking] = pod["spec"]["containers"]
    assert asking["image"] == container()["image"]
    assert "http://mistral-7b-predictor.mistral.svc" in asking["args"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert ("Pod", "mistral-7b-test") not in render()
