"""Helm 4 renders what Helm 3 renders: Helm 3 is the command, Helm 4 its library under Python."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from charts.render_manifests import CHART, IMAGE, NAMESPACE, load, scenarios
from tests.support.helm import SCENARIOS, render

helm4 = pytest.importorskip("helm_python", reason="helm-python-sdk, Helm 4's library, is not installed")


def overlaid(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return the values with more of them laid over, as two values files are."""
    both = {key: overlaid(values[key], part) for key, part in more.items() if isinstance(values.get(key), dict)}
    return {**values, **more, **both}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_helm_4_renders_what_helm_3_renders(scenario: str) -> None:
    values = overlaid({"image": {"repository": IMAGE}}, yaml.safe_load(scenarios()[scenario].read_text()))
    with helm4.Chart.load(CHART) as chart:
        templates = chart.render(values, name="mistral-7b", namespace=NAMESPACE)
    objects = load("\n---\n".join(text for path, text in templates.items() if not path.endswith("NOTES.txt")))
    objects.pop(("Pod", "mistral-7b-test"))  # a hook
    assert objects == render(scenario=scenario)


def test_helm_4_refuses_with_the_same_sentence() -> None:
    with helm4.Chart.load(CHART) as chart, pytest.raises(helm4.HelmError, match=r"image\.repository is empty"):
        chart.render({}, name="mistral-7b", namespace=NAMESPACE)
