"""Every alert fires when it should and stays silent when it should not: Prometheus' own `promtool test rules`.

The cases are in `alerts/`, in promtool's format.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.helm import render

CASES = Path(__file__).parent / "alerts"
PROMTOOL = shutil.which("promtool")
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "knative": ("production", {}),
    "standard": ("standard-keda", {"monitoring.prometheusRule.enabled": True}),
}
pytestmark = pytest.mark.parametrize("mode", MODES)


def rules(mode: str) -> list[dict[str, Any]]:
    scenario, values = MODES[mode]
    [group] = render(values, scenario=scenario)[("PrometheusRule", "mistral-7b")]["spec"]["groups"]
    return group["rules"]


def cases(mode: str) -> dict[str, Any]:
    """The cases of a mode, each expected alert with the annotations of its rule."""
    annotations = {rule["alert"]: rule["annotations"] for rule in rules(mode)}
    document = yaml.safe_load((CASES / f"{mode}.yaml").read_text())
    for case in (case for test in document["tests"] for case in test["alert_rule_test"]):
        for expected in case["exp_alerts"]:
            expected["exp_annotations"] = annotations[case["alertname"]]
    return document


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: apt-get install prometheus")
def test_promtool_sees_each_alert_fire_and_stay_silent_as_its_cases_say(mode: str, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "rendered", "rules": rules(mode)}]}))
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases(mode)))

    run = subprocess.run([str(PROMTOOL), "test", "rules", "cases.yaml"], cwd=tmp_path, capture_output=True, text=True)

    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alert_of_a_mode_has_a_case_in_which_it_fires_and_one_in_which_it_does_not(mode: str) -> None:
    checked = [case for test in cases(mode)["tests"] for case in test["alert_rule_test"]]
    elsewhere = {rule["expr"] for rule in rules("knative")} if mode != "knative" else set()
    expected = {rule["alert"] for rule in rules(mode) if rule["expr"] not in elsewhere}

    assert {case["alertname"] for case in checked if case["exp_alerts"]} == expected
    assert {case["alertname"] for case in checked if not case["exp_alerts"]} == expected
