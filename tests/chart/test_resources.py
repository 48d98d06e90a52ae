"""The resources of the pod after KServe's defaulting webhook has filled in what the chart leaves out.

The rule is that of KServe 0.20, pkg/apis/serving/v1beta1/inference_service_defaults.go, with the defaults of its
inferenceservice-config: each missing key of requests and of limits is added on its own. The API server then refuses
a pod that requests more than its limit, after every dry run said yes.
"""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes.utils.quantity import parse_quantity

from charts.render_manifests import Object
from tests.support.helm import SCENARIOS, container, refusal

KSERVE_DEFAULTS = {"cpu": "1", "memory": "2Gi"}


def defaulted(resources: Object) -> Object:
    return {half: {**KSERVE_DEFAULTS, **resources.get(half, {})} for half in ("requests", "limits")}


def above_their_limits(resources: Object) -> set[str]:
    requests, limits = resources["requests"], resources["limits"]
    return {key for key in requests if key in limits and parse_quantity(requests[key]) > parse_quantity(limits[key])}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kserve_has_nothing_to_add_to_the_resources(scenario: str) -> None:
    resources = container(scenario=scenario)["resources"]
    assert defaulted(resources) == resources


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_request_is_above_its_limit_after_kserves_defaults(scenario: str) -> None:
    assert not above_their_limits(defaulted(container(scenario=scenario)["resources"]))


def test_a_missing_cpu_limit_would_have_been_noticed() -> None:
    """Three CPUs were requested without a limit, and no GPU scenario got a pod on a stock KServe."""
    once = {"requests": {"cpu": "3", "memory": "16Gi"}, "limits": {"memory": "24Gi"}}
    assert above_their_limits(defaulted(once)) == {"cpu"}


@pytest.mark.parametrize("half", ["requests", "limits"])
@pytest.mark.parametrize("key", ["cpu", "memory"])
def test_a_missing_resource_is_refused_before_kserve_fills_it_in(half: str, key: str) -> None:
    assert f"resources.{half}.{key} is missing" in refusal({f"resources.{half}.{key}": None})


@pytest.mark.parametrize(
    ("request_", "limit", "accepted"),
    [("500m", "0.5", True), ("1", "999m", False), ("1Gi", "1G", False), ("1G", "1Gi", True), (2, "1900m", False)],
)
def test_quantities_are_compared_as_kubernetes_reads_them(request_: Any, limit: Any, accepted: bool) -> None:
    key = "memory" if "G" in str(request_) else "cpu"
    values = {f"resources.requests.{key}": request_, f"resources.limits.{key}": limit}
    if accepted:
        container(values)
    else:
        assert f"resources.requests.{key} {request_} is above" in refusal(values)
