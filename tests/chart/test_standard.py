"""Standard mode: a Deployment instead of Knative."""

from __future__ import annotations

from charts.render_manifests import IMAGE
from tests.support.helm import container, helm_test_pod, inference_service, predictor, render

STANDARD = {
    "inferenceService.mode": "Standard",
    "scaling.minReplicas": 1,
    "scaling.standard.prometheusAddress": "http://prometheus:9090",
    "monitoring.podMonitor.enabled": True,
}


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


def test_a_standard_canary_is_the_stable_predictor_with_another_image() -> None:
    spec = inference_service(scenario="standard-canary")["spec"]
    [canary] = spec["canary"]
    assert canary["trafficPercent"] == 10
    stable, other = spec["predictor"], canary["predictor"]
    assert other["name"] == "v2"
    assert other["containers"][0].pop("image") == f"{IMAGE}:0.2.0"
    assert stable["containers"][0].pop("image") == f"{IMAGE}:0.1.0"
    assert other["containers"] == stable["containers"]
    assert not {"maxReplicas", "scaleMetric", "scaleTarget", "autoScaling"} & other.keys()


def test_a_standard_canary_with_another_model_may_download_it() -> None:
    values = {"rollout.standard.canary.storageUri": "hf://a/b:c"}
    objects = render(values, "standard-canary")
    [canary] = objects[("InferenceService", "mistral-7b")]["spec"]["canary"]
    assert {"name": "STORAGE_URI", "value": "hf://a/b:c"} in canary["predictor"]["containers"][0]["env"]
    [storage] = [o for (kind, _), o in objects.items() if kind == "ClusterStorageContainer"]
    assert {"prefix": "hf://a/b"} in storage["spec"]["supportedUriFormats"]


def test_a_promoted_predictor_is_asked_under_its_name() -> None:
    values = {**STANDARD, "rollout.standard.predictorName": "v2"}
    assert predictor(values)["name"] == "v2"
    [asking] = helm_test_pod(values)["spec"]["containers"]
    assert "http://mistral-7b-v2-predictor.mistral.svc:8080" in asking["args"]


def test_a_hung_server_is_replaced_without_waiting_for_its_drain() -> None:
    """Knative's own CRD drops this field, so only Standard mode has it."""
    assert container(STANDARD)["livenessProbe"]["terminationGracePeriodSeconds"] == 10
    assert "terminationGracePeriodSeconds" not in container()["livenessProbe"]
