"""The Knative Service that is tried is the one that KServe makes."""

from __future__ import annotations

import pytest

from mistral_cli.preflight.release.knative_service import COMPONENT_FIELDS, knative_service, pod_spec
from tests.support.helm import SCENARIOS, inference_service

pytestmark = pytest.mark.chart


def test_scaling_becomes_annotations_and_the_timeout_stands_twice() -> None:
    spec = knative_service(inference_service(), "mistral", with_account=True)["spec"]["template"]
    annotations = spec["metadata"]["annotations"]
    prefix = "autoscaling.knative.dev"
    assert annotations[f"{prefix}/min-scale"] == "0"
    assert annotations[f"{prefix}/max-scale"] == "2"
    assert annotations[f"{prefix}/metric"] == "concurrency"
    assert spec["spec"]["timeoutSeconds"] == spec["spec"]["responseStartTimeoutSeconds"] == 600


def test_the_inference_services_annotations_and_labels_reach_the_revision() -> None:
    service = inference_service({"inferenceService.labels": {"team": "a"}})
    template = knative_service(service, "mistral", with_account=True)["spec"]["template"]["metadata"]
    assert template["labels"]["team"] == "a"
    assert template["annotations"]["serving.knative.dev/progress-deadline"] == "1800s"


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if "standard" not in s])
def test_no_field_of_kserves_own_is_left_in_the_pod(scenario: str) -> None:
    assert not COMPONENT_FIELDS & set(pod_spec(inference_service(scenario=scenario), with_account=True))


def test_a_service_account_that_is_not_there_yet_is_left_out() -> None:
    made = knative_service(inference_service(), "mistral", with_account=False)
    assert "serviceAccountName" not in made["spec"]["template"]["spec"]
