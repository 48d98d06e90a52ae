"""What the chart renders: the InferenceService and what goes with it, for the choices a user has."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from charts.render_manifests import CHART, helm_template, scenarios, tool
from tests.helm import SCENARIOS, container, environment, inference_service, predictor, render

STANDARD = {
    "inferenceService.mode": "Standard",
    "scaling.minReplicas": 1,
    "scaling.standard.prometheusAddress": "http://prometheus:9090",
    "monitoring.podMonitor.enabled": True,
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_helm_lint_finds_nothing_in_any_scenario(scenario: str) -> None:
    command = [tool("helm"), "lint", "--strict", str(CHART), "--values", str(scenarios()[scenario])]
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


def bumped_chart(tmp_path: Path) -> Path:
    chart = tmp_path / "mistral-7b"
    shutil.copytree(CHART, chart)
    file = chart / "Chart.yaml"
    file.write_text(file.read_text().replace("version: 0.1.0", "version: 9.9.9", 1))
    return chart


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_chart_version_bump_makes_no_new_revision(scenario: str, tmp_path: Path) -> None:
    assert inference_service(scenario=scenario, chart=bumped_chart(tmp_path)) == inference_service(
        scenario=scenario
    )


def test_a_chart_version_bump_does_not_fill_the_cache_again(tmp_path: Path) -> None:
    before, after = render(scenario="pvc-cache"), render(scenario="pvc-cache", chart=bumped_chart(tmp_path))
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
            assert (
                not {"helm.sh/chart", "app.kubernetes.io/version"}
                & o["spec"]["template"]["metadata"]["labels"].keys()
            )


# ---- Image and canary ----


def test_the_image_is_the_charts_app_version_unless_a_tag_is_given() -> None:
    assert container()["image"] == "mistral-7b-kserve:0.1.0"
    assert container({"image.tag": "7"})["image"] == "mistral-7b-kserve:7"


def test_a_digest_wins_over_the_tag() -> None:
    digest = "sha256:" + "0" * 64
    assert container({"image.tag": "7", "image.digest": digest})["image"] == f"mistral-7b-kserve@{digest}"


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
    assert (
        inference_service(values)["metadata"]["annotations"]["serving.kserve.io/enable-tag-routing"]
        == "false"
    )
    assert environment(values)["MISTRAL_PLAYGROUND"] == "false"
    assert environment(values)["MISTRAL_MAX_QUEUE_SIZE"] == "0"


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


def test_a_cpu_demo_asks_for_nothing_of_a_gpu_node() -> None:
    demo = predictor(scenario="minimal-cpu")
    assert not {"nodeSelector", "tolerations"} & demo.keys()
    assert "nvidia.com/gpu" not in demo["containers"][0]["resources"]["limits"]


# ---- Weights ----


def test_the_weights_are_pinned_to_a_commit_by_default() -> None:
    name, revision = environment()["STORAGE_URI"].removeprefix("hf://").split(":")
    assert name == "mistralai/Mistral-7B-Instruct-v0.3"
    assert len(revision) == 40


def test_the_download_has_memory_of_its_own_and_takes_the_weights_once() -> None:
    [storage] = [o for (kind, _), o in render().items() if kind == "ClusterStorageContainer"]
    assert predictor()["storageContainerName"] == storage["metadata"]["name"]
    assert storage["spec"]["container"]["name"] == "storage-initializer"
    assert storage["spec"]["container"]["resources"]["limits"]["memory"] == "8Gi"
    assert '"consolidated*"' in storage["spec"]["container"]["env"][0]["value"]


def test_the_download_settings_take_over_nobody_elses_downloads() -> None:
    [storage] = [o for (kind, _), o in render().items() if kind == "ClusterStorageContainer"]
    assert storage["spec"]["supportedUriFormats"] == [{"prefix": environment()["STORAGE_URI"]}]


@pytest.mark.parametrize("uri", ["pvc://claim/mistral", "oci://registry.example/mistral:1"])
def test_weights_that_are_mounted_need_no_download_settings(uri: str) -> None:
    values = {"storage.uri": uri}
    assert environment(values)["STORAGE_URI"] == uri
    assert "storageContainerName" not in predictor(values)
    assert not any(kind == "ClusterStorageContainer" for kind, _ in render(values))


@pytest.mark.parametrize(
    "uri", ["s3://bucket/mistral", "gs://bucket/mistral", "https://host.example/mistral.tar"]
)
def test_weights_from_elsewhere_are_downloaded_with_the_same_settings(uri: str) -> None:
    assert environment({"storage.uri": uri})["STORAGE_URI"] == uri
    assert "storageContainerName" in predictor({"storage.uri": uri})


def test_kserves_own_download_settings_can_be_kept() -> None:
    values = {"storage.initializer.create": False}
    assert "storageContainerName" not in predictor(values)
    assert not any(kind == "ClusterStorageContainer" for kind, _ in render(values))
    named = {"storage.initializer.create": False, "storage.initializer.name": "ours"}
    assert predictor(named)["storageContainerName"] == "ours"


def test_a_server_with_its_weights_never_asks_the_hub() -> None:
    assert environment()["HF_HUB_OFFLINE"] == "1"


def test_a_server_that_downloads_by_itself_has_the_token_and_the_room() -> None:
    values = {
        "storage.uri": "",
        "server.modelId": "a/b",
        "server.modelRevision": "main",
        "hfToken.secretName": "hf",
    }
    variables = environment(values)
    assert variables["MISTRAL_MODEL_ID"] == "a/b"
    assert variables["MISTRAL_MODEL_REVISION"] == "main"
    assert "STORAGE_URI" not in variables
    assert "HF_HUB_OFFLINE" not in variables
    assert "HF_TOKEN" in variables
    mounts = {m["name"]: m["mountPath"] for m in container(values)["volumeMounts"]}
    assert mounts["hub"] == variables["HF_HOME"]


def test_the_cache_is_filled_with_what_the_server_mounts() -> None:
    objects = render(scenario="pvc-cache")
    [claim] = [o for (kind, _), o in objects.items() if kind == "PersistentVolumeClaim"]
    [job] = [o for (kind, _), o in objects.items() if kind == "Job"]
    pod = job["spec"]["template"]["spec"]
    script, uri, directory = pod["containers"][0]["args"]
    assert (
        environment(scenario="pvc-cache")["STORAGE_URI"] == f"pvc://{claim['metadata']['name']}/{directory}"
    )
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert uri == environment()["STORAGE_URI"]


def test_the_cache_survives_an_uninstall() -> None:
    [claim] = [o for (kind, _), o in render(scenario="pvc-cache").items() if kind == "PersistentVolumeClaim"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_another_model_gets_another_job_and_another_directory() -> None:
    one, other = render(scenario="pvc-cache"), render({"storage.uri": "hf://a/b:c"}, scenario="pvc-cache")
    assert {key for key in one if key[0] == "Job"}.isdisjoint(other)
    assert (
        environment({"storage.uri": "hf://a/b:c"}, "pvc-cache")["STORAGE_URI"]
        != environment(scenario="pvc-cache")["STORAGE_URI"]
    )


def fill(tmp_path: Path, initializer: str) -> subprocess.CompletedProcess[str]:
    """Run the Job's own script against a directory, with a download of our making."""
    [job] = [o for (kind, _), o in render(scenario="pvc-cache").items() if kind == "Job"]
    script, uri, directory = job["spec"]["template"]["spec"]["containers"][0]["args"]
    download = tmp_path / "initializer"
    download.write_text(f"#!/bin/sh\n{initializer}\n")
    download.chmod(0o755)
    script = script.replace("/storage-initializer/scripts/initializer-entrypoint", str(download))
    (tmp_path / "cache").mkdir(exist_ok=True)
    script = script.replace("/cache", str(tmp_path / "cache"))
    return subprocess.run(["sh", "-euc", script, uri, "model"], capture_output=True, text=True)


def test_the_cache_shows_the_weights_only_when_all_are_there(tmp_path: Path) -> None:
    model = tmp_path / "cache" / "model"
    model.mkdir(parents=True)  # the kubelet makes it for a replica that started first
    assert fill(tmp_path, 'mkdir -p "$2"; touch "$2/config.json"; exit 1').returncode != 0
    assert not list(model.iterdir())
    assert fill(tmp_path, 'mkdir "$2"; touch "$2/config.json" "$2/model.safetensors"').returncode == 0
    assert {p.name for p in model.iterdir()} == {"config.json", "model.safetensors"}


def test_a_full_cache_is_not_filled_again(tmp_path: Path) -> None:
    fill(tmp_path, 'mkdir "$2"; touch "$2/config.json"')
    assert fill(tmp_path, "exit 1").returncode == 0


# ---- Secrets ----


def test_an_existing_token_is_attached_to_the_service_account() -> None:
    objects = render({"hfToken.secretName": "hf", "serviceAccount.secrets": ["s3"]})
    assert objects[("ServiceAccount", "mistral-7b")]["secrets"] == [{"name": "hf"}, {"name": "s3"}]
    assert not any(kind == "Secret" for kind, _ in objects)


def test_a_token_in_the_values_becomes_a_secret() -> None:
    objects = render({"hfToken.token": "hf_x"})
    assert objects[("Secret", "mistral-7b-hf-token")]["stringData"] == {"HF_TOKEN": "hf_x"}
    assert objects[("ServiceAccount", "mistral-7b")]["secrets"] == [{"name": "mistral-7b-hf-token"}]


def test_api_keys_in_the_values_become_a_secret_with_one_key_a_line() -> None:
    secret = render({"apiKeys.keys": ["first-key", "second-key"]})[("Secret", "mistral-7b-api-keys")]
    assert secret["stringData"]["api-keys"] == "first-key\nsecond-key\n"


@pytest.mark.parametrize("values", [{"apiKeys.secretName": "keys"}, {"apiKeys.keys": ["a-long-key"]}])
def test_api_keys_are_mounted_so_that_a_rotation_arrives(values: dict[str, object]) -> None:
    [mount] = [m for m in container(values)["volumeMounts"] if m["name"] == "api-keys"]
    assert "subPath" not in mount
    assert environment(values)["MISTRAL_API_KEY_FILE"] == f"{mount['mountPath']}/api-keys"


def test_secrets_never_stand_in_the_inference_service() -> None:
    assert "hf_x" not in str(inference_service({"hfToken.token": "hf_x", "apiKeys.keys": ["a-long-key"]}))
    assert "a-long-key" not in str(inference_service({"apiKeys.keys": ["a-long-key"]}))


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


def test_the_network_policy_lets_knative_in_and_the_download_out() -> None:
    policy = render(scenario="production")[("NetworkPolicy", "mistral-7b")]["spec"]
    assert policy["podSelector"]["matchLabels"] == {"serving.kserve.io/inferenceservice": "mistral-7b"}
    [ingress] = policy["ingress"]
    assert {p["port"] for p in ingress["ports"]} == {8080, 8012, 8013, 8112, 8022, 9090, 9091}
    assert "knative-serving" in ingress["from"][1]["namespaceSelector"]["matchExpressions"][0]["values"]
    assert {p["port"] for rule in policy["egress"] for p in rule["ports"]} == {53, 443}


# ---- Standard mode ----


def test_standard_mode_carries_nothing_of_knative() -> None:
    service = inference_service(STANDARD)
    assert "knative" not in str(service).lower()
    assert not {"containerConcurrency", "canaryTrafficPercent"} & service["spec"]["predictor"].keys()


def test_standard_mode_waits_for_the_drain_before_the_kill() -> None:
    values = {**STANDARD, "server.drainSeconds": 120}
    assert predictor(values)["terminationGracePeriodSeconds"] > 120 + 5
    assert container(values)["lifecycle"] == {"preStop": {"sleep": {"seconds": 5}}}


def test_a_standard_rollout_needs_no_spare_gpu() -> None:
    assert predictor(STANDARD)["deploymentStrategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_keda_scales_on_the_servers_own_queue() -> None:
    [metric] = predictor(STANDARD)["autoScaling"]["metrics"]
    assert metric["external"]["target"] == {"type": "Value", "value": "32"}
    assert metric["external"]["metric"]["query"] == (
        'sum(mistral_requests_running{namespace="mistral",inferenceservice="mistral-7b"}'
        ' + mistral_requests_waiting{namespace="mistral",inferenceservice="mistral-7b"})'
    )
    annotations = inference_service(STANDARD)["metadata"]["annotations"]
    assert annotations["serving.kserve.io/autoscalerClass"] == "keda"


def test_an_hpa_scales_on_what_it_can_read() -> None:
    hpa = predictor(scenario="standard-hpa")
    assert (hpa["scaleMetric"], hpa["scaleTarget"]) == ("cpu", 80)
    assert "autoScaling" not in hpa


# ---- The rest ----


def test_the_inference_service_can_wait_until_the_cache_is_full() -> None:
    kinds = {kind for kind, _ in render({"inferenceService.create": False}, scenario="pvc-cache")}
    assert kinds == {"ServiceAccount", "PersistentVolumeClaim", "Job"}


def test_extra_objects_may_be_yaml_or_templates() -> None:
    text = "kind: ConfigMap\nmetadata: {name: '{{ .Release.Name }}-text'}"
    objects = render({"extraObjects": [text, {"kind": "ConfigMap", "metadata": {"name": "yaml"}}]})
    assert {("ConfigMap", "mistral-7b-text"), ("ConfigMap", "yaml")} <= objects.keys()


@pytest.mark.parametrize(("release", "name"), [("mistral-7b", "mistral-7b"), ("chat", "chat-mistral-7b")])
def test_names_follow_the_release(release: str, name: str) -> None:
    command = [
        tool("helm"),
        "template",
        release,
        str(CHART),
        "--show-only",
        "templates/inferenceservice.yaml",
    ]
    assert f"  name: {name}\n" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_helm_test_asks_the_served_model_from_the_servers_own_image() -> None:
    command = [
        tool("helm"),
        "template",
        "mistral-7b",
        str(CHART),
        "--show-only",
        "templates/tests/predict.yaml",
    ]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert 'image: "mistral-7b-kserve:0.1.0"' in rendered
    assert "http://mistral-7b-predictor.default.svc" in rendered
    assert "helm.sh/hook: test" not in helm_template()
