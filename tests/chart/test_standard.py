"""Standard mode: a Deployment instead of Knative."""

from __future__ import annotations

from tests.support.helm import container, inference_service, predictor

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
