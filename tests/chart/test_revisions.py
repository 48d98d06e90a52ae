"""A new revision is a model reload on a second GPU: a change that the server cannot see makes none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from charts.render_manifests import CHART
from tests.support.helm import (
    SCENARIOS,
    inference_service,
    render,
)


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
