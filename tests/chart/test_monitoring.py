"""Alerts and dashboard watch series that exist, under the names of today's Knative."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import Counter
from prometheus_client.metrics import MetricWrapperBase

from charts.render_manifests import CHART, Object
from model_server import errors
from tests.chart.test_standard import STANDARD
from tests.support.helm import render

metrics = pytest.importorskip("model_server.telemetry.metrics", reason="no server here to compare with")

ALERTS = {
    "MistralDown",
    "MistralErrors",
    "MistralQueueLong",
    "MistralSlowFirstToken",
    "MistralColdStarts",
    "MistralKvCacheFull",
}
KNATIVE = {
    "kn_revision_pods_desired",
    "kn_revision_pods_count",
    "kn_revision_concurrency_stable",
    "kn_revision_concurrency_target",
    "kn_revision_request_concurrency",
    "kn_serving_invocation_duration_seconds_bucket",
}
"""Names since Knative 1.19, when its metrics became OpenTelemetry's."""


def rules() -> list[Object]:
    [group] = render(scenario="production")[("PrometheusRule", "mistral-7b")]["spec"]["groups"]
    return group["rules"]


def dashboard() -> Any:
    [text] = render(scenario="production")[("ConfigMap", "mistral-7b-dashboard")]["data"].values()
    return json.loads(text)


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))


def declared_series() -> set[str]:
    names = set()
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            [family] = metric.describe()
            names |= {f"{family.name}_total"} if isinstance(metric, Counter) else {family.name, f"{family.name}_bucket"}
    return names


def error_codes(root: type[errors.ServeError] = errors.ServeError) -> set[str]:
    return {root.code}.union(*(error_codes(child) for child in root.__subclasses__()))


def test_every_series_asked_for_is_one_the_server_has() -> None:
    asked = {name for expression in expressions() for name in re.findall(r"\bmistral_\w+", expression)}
    assert asked <= declared_series()


def test_every_series_of_the_server_is_on_the_dashboard() -> None:
    shown = json.dumps(dashboard())
    assert not [name for name in declared_series() if name.removesuffix("_bucket") not in shown]


def test_knatives_series_have_the_names_of_today() -> None:
    asked = {name for expression in expressions() for name in re.findall(r"\bkn_\w+", expression)}
    assert asked - {"kn_revision_name", "kn_service_name"} == KNATIVE


def test_there_is_an_alert_for_each_way_to_fail() -> None:
    assert {rule["alert"] for rule in rules()} == ALERTS


def test_an_alert_has_no_field_that_prometheus_does_not_know() -> None:
    for rule in rules():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]


def test_an_alert_watches_this_release_only() -> None:
    for rule in rules():
        selectors = re.findall(r"\{(.*?)\}", rule["expr"])
        assert selectors
        assert all('namespace="mistral",inferenceservice="mistral-7b"' in s for s in selectors)


def test_the_error_alert_counts_outcomes_that_the_server_gives() -> None:
    [expression] = [rule["expr"] for rule in rules() if rule["alert"] == "MistralErrors"]
    [outcomes] = re.findall(r'outcome=~"(.*?)"', expression)
    assert set(outcomes.split("|")) <= error_codes()


def test_the_queue_alert_follows_the_queue() -> None:
    values = {"server.maxQueueSize": 10}
    spec = render(values, scenario="production")[("PrometheusRule", "mistral-7b")]["spec"]
    [expression] = [r["expr"] for r in spec["groups"][0]["rules"] if r["alert"] == "MistralQueueLong"]
    assert expression.strip().endswith("> 5")


@pytest.mark.parametrize(
    ("values", "port"), [({"monitoring.podMonitor.enabled": True}, "user-port"), (STANDARD, "http1")]
)
def test_the_scrape_finds_the_port_by_the_name_it_has_in_the_pod(values: Any, port: str) -> None:
    spec = render(values)[("PodMonitor", "mistral-7b")]["spec"]
    assert spec.keys() == {"selector", "podMetricsEndpoints"}
    [endpoint] = spec["podMetricsEndpoints"]
    assert endpoint.keys() == {"port", "path", "interval", "relabelings"}
    assert endpoint["port"] == port
    assert spec["selector"]["matchLabels"] == {"serving.kserve.io/inferenceservice": "mistral-7b"}


def test_the_dashboard_is_the_file_in_the_chart() -> None:
    assert dashboard() == json.loads((CHART / "files" / "dashboard.json").read_text())


def test_panels_have_titles_units_and_numbers_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["type"] == "row" or panel["fieldConfig"]["defaults"]["unit"]
