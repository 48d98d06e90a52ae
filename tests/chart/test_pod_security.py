"""The pod runs with as few rights as the server needs."""

from __future__ import annotations

import pytest

from tests.support.helm import (
    SCENARIOS,
    container,
    predictor,
)


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
