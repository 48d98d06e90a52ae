"""Every scenario's objects are accepted and its pod is created, whether or not a node has the GPU for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from charts.render_manifests import load, render, scenarios
from tests.e2e.cluster import Release, wait_until

SECRETS = {"hf-token": "HF_TOKEN", "mistral-7b-api-keys": "api-keys"}


@pytest.mark.parametrize("scenario", scenarios())
def test_the_scenarios_pod_is_created(make_release: Callable[[str], Release], scenario: str) -> None:
    release = make_release(f"-{scenario}")
    for kind in {kind for kind, _ in load(render(scenario))}:
        if kind in ("PodMonitor", "PrometheusRule") and kind.lower() not in release.kubectl("api-resources"):
            pytest.skip(f"the cluster has no {kind}: Prometheus' operator is not installed")
    release.kubectl("create", "namespace", release.namespace)
    for name, key in SECRETS.items():
        release.kubectl("create", "secret", "generic", name, f"--from-literal={key}=none")

    release.install(scenario)

    wait_until(lambda: release.objects("pod") != [], f"{scenario} has a pod")
    release.uninstall()
