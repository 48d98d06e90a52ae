"""What is written about the chart, and what the chart writes, against the chart and the server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts.render_manifests import CHART, Object
from charts.render_readme import described_values, readme
from tests.support.helm import SCENARIOS, notes

settings = pytest.importorskip("model_server.settings", reason="no server here to compare with")

VALUES = (CHART / "values.yaml").read_text()
DOCS = Path(__file__).parents[2] / "docs"
SCALING = (DOCS / "scaling.md").read_text()
SETTINGS_PAGE = (DOCS / "settings.md").read_text()
CHARTS_OWN = {"drain_seconds", "request_timeout_seconds", "log_format"}
"""Settings whose default the chart changes: docs/scaling.md says why."""


def test_the_readme_is_the_one_that_the_values_make() -> None:
    assert (CHART / "README.md").read_text() == readme(), "run `make manifests`"


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in values.items():
        found += leaves(value, (*path, key)) if isinstance(value, dict) and value else [(*path, key)]
    return found


def test_every_value_is_described() -> None:
    described = {value.path for value in described_values(VALUES)}
    for path in leaves(yaml.safe_load(VALUES)):
        assert any(path[:n] in described for n in range(1, len(path) + 1)), ".".join(path)


def test_the_readme_names_every_scenario() -> None:
    named = re.findall(r"`ci/([\w-]+)-values\.yaml`", (CHART / "README.md").read_text())
    assert sorted(named) == SCENARIOS


def camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(other.capitalize() for other in others)


def test_the_charts_server_values_are_the_servers_flags_in_their_order() -> None:
    assert list(yaml.safe_load(VALUES)["server"]) == [camel_case(name) for name in settings.flag_fields()]


def default(name: str) -> Any:
    value = settings.flag_fields()[name].default
    return list(value) if isinstance(value, tuple) else value


def test_the_chart_keeps_the_servers_defaults_but_for_three() -> None:
    server = yaml.safe_load(VALUES)["server"]
    differing = {name for name in settings.flag_fields() if server[camel_case(name)] != default(name)}
    assert differing == CHARTS_OWN


def test_the_settings_page_has_the_servers_flags() -> None:
    ours = SETTINGS_PAGE.split("## KServe's own flags")[0]
    assert set(re.findall(r"(?m)^\| `--(\w+)` \|", ours)) == set(settings.flag_fields())


def test_the_scaling_page_says_which_defaults_the_chart_changes() -> None:
    rows = re.findall(r"(?m)^\| `server\.(\w+)` \| (.*?) \| (.*?) \|", SCALING)
    assert {name for name, *_ in rows} == {camel_case(name) for name in CHARTS_OWN}
    server = yaml.safe_load(VALUES)["server"]
    for name in CHARTS_OWN:
        [(_, of_the_server, of_the_chart)] = [row for row in rows if row[0] == camel_case(name)]
        assert yaml.safe_load(of_the_server) == default(name)
        assert yaml.safe_load(of_the_chart) == server[camel_case(name)]


def test_the_notes_read_the_host_from_the_status_and_never_compute_it() -> None:
    text = notes()
    assert "-o jsonpath='{.status.url}'" in text
    assert "svc.cluster.local" not in text


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_notes_have_the_request_for_this_release(scenario: str) -> None:
    text = notes(scenario=scenario)
    assert "/v1/models/mistral-7b:predict" in text
    assert "kubectl get inferenceservice mistral-7b" in text
    assert "no value" not in text


def test_the_notes_name_each_flag_with_its_command() -> None:
    text = notes({"runtimeClassName": "nvidia", "cluster.knativeFlags": knative_flags("runtimeclassname")})
    for flag in knative_flags("runtimeclassname"):
        assert f'--type merge -p \'{{"data":{{"{flag}":"enabled"}}}}\'' in text


def knative_flags(*more: str) -> list[str]:
    return [f"kubernetes.podspec-{name}" for name in ("nodeselector", "tolerations", *more)]


def test_the_notes_send_a_key_when_keys_are_set() -> None:
    assert "Authorization: Api-Key $KEY" in notes(scenario="production")
    assert "Authorization" not in notes(scenario="gfd")


def test_the_notes_name_the_preflight_first() -> None:
    assert notes().index("mistral preflight --namespace") < notes().index("kubectl wait")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_line_of_the_notes_announces_something_that_does_not_follow(scenario: str) -> None:
    assert re.findall(r".*:\n(?!\n? )", notes(scenario=scenario)) == []


@pytest.mark.parametrize(
    ("scenario", "said"),
    [("gfd", "The first replica downloads"), ("pvc-cache", "A Job fills the volume"), ("minimal-cpu", None)],
)
def test_the_notes_say_where_the_weights_come_from(scenario: str, said: str | None) -> None:
    phrases = {"The first replica downloads", "A Job fills the volume"}
    assert {phrase for phrase in phrases if phrase in notes(scenario=scenario)} == ({said} if said else set())


def test_the_notes_have_the_command_for_a_secret_of_keys_that_is_not_there_yet() -> None:
    text = notes(scenario="production")
    assert "kubectl create secret generic mistral-7b-api-keys -n mistral --from-file=api-keys=/dev/stdin" in text
    assert text.index("create secret generic mistral-7b-api-keys") < text.index("KEY=$(")
    assert "create secret" not in notes({"apiKeys.keys": ["0123456789abcdef"]}, scenario="gfd")


def test_the_notes_of_standard_mode_wait_for_the_deployment_since_ready_comes_before_a_ready_pod() -> None:
    text = notes({"rollout.standard.predictorName": "v2"}, scenario="standard-hpa")
    assert "--for=jsonpath='{.status.readyReplicas}'=1 deployment/mistral-7b-v2-predictor" in text
    assert "--for=condition=Ready" not in text


@pytest.mark.parametrize("scenario", ["standard-hpa", "standard-keda"])
def test_the_notes_of_standard_mode_name_no_gateway_of_knatives(scenario: str) -> None:
    assert "istio" not in notes(scenario=scenario).lower()
    assert "kubectl get httproute,ingress -n mistral" in notes(scenario=scenario)


def test_the_notes_of_a_canary_say_how_to_promote_and_to_stop_it() -> None:
    assert "rollout.canaryTrafficPercent 100 to promote it, or 0 to stop it" in notes(scenario="canary")
    assert "promote" not in notes(scenario="gfd")


def test_the_notes_warn_of_a_pod_monitor_that_may_not_be_selected() -> None:
    assert "podMonitorSelector" in notes({"monitoring.podMonitor.enabled": True})
    assert "podMonitorSelector" not in notes(scenario="production")


def test_the_notes_warn_of_an_image_named_by_tag() -> None:
    assert "so set image.digest" in notes()
    assert "install by image.digest" not in notes({"image.digest": f"sha256:{'0' * 64}"})


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ({"hfToken.secretName": "", "hfToken.required": False}, "ask for an account that accepted Mistral's terms"),
        ({"hfToken.secretName": "hf"}, None),
        ({"storage.uri": "pvc://claim/mistral"}, None),
    ],
)
def test_the_notes_warn_of_a_gated_model_without_a_token(values: Object, warned: str | None) -> None:
    assert ("accepted Mistral's terms" in notes(values)) == bool(warned)
