"""Alerts and dashboard ask for series that exist, by labels that these have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Counter
from prometheus_client.metrics import MetricWrapperBase

from charts.render_manifests import CHART, Object
from model_server import errors
from tests.chart.test_standard import STANDARD
from tests.support.helm import render

metrics = pytest.importorskip("model_server.telemetry.metrics", reason="no server here to compare with")

ROOT = Path(__file__).parents[2]
SCRAPED = {"namespace", "pod", "endpoint", "inferenceservice", "revision"}
"""Labels that the Prometheus operator and the PodMonitor give every series of the pod."""
SERVICE = {"k8s_namespace_name", "kn_service_name", "kn_revision_name"}
LABELS = {
    # The client library and Prometheus itself.
    "up": SCRAPED,
    "process_start_time_seconds": SCRAPED,
    # Knative 1.21 to 1.23, autoscaler: pkg/reconciler/autoscaling/kpa/metrics.go, pkg/autoscaler/scaling/metrics.go.
    "kn_revision_pods_requested": SERVICE,
    "kn_revision_pods_desired": SERVICE,
    "kn_revision_pods_count": SERVICE,
    "kn_revision_concurrency_stable": SERVICE,
    "kn_revision_concurrency_target": SERVICE,
    # Activator: pkg/activator/handler/concurrency_reporter.go, and metric_handler.go with otelhttp.
    "kn_revision_request_concurrency": SERVICE,
    "http_server_request_duration_seconds_count": SERVICE | {"http_response_status_code"},
    "http_server_request_duration_seconds_sum": SERVICE | {"http_response_status_code"},
    # queue-proxy, pkg/queue/request_metric.go: the service is an attribute of the resource, which is no label.
    "kn_serving_invocation_duration_seconds_bucket": SCRAPED | {"le", "http_response_status_code"},
    # kube-state-metrics.
    "kube_pod_container_status_restarts_total": {"namespace", "pod", "container"},
    "kube_deployment_status_replicas_unavailable": {"namespace", "deployment"},
}
"""The series that are not the server's, and the labels they have."""


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


def asked() -> Iterator[tuple[str, set[str]]]:
    """Each series an expression selects or sums, with the labels it is asked by."""
    for expression in expressions():
        grouped = set(re.findall(r"\w+", " ".join(re.findall(r"\bby \((.*?)\)", expression))))
        for name, selector in re.findall(r"\b([a-z_]+)\{(.*?)\}", expression):
            yield name, set(re.findall(r"(\w+)=", selector)) | grouped


def declared_series() -> dict[str, set[str]]:
    """The server's series and their labels."""
    names: dict[str, set[str]] = {}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            [family] = metric.describe()
            labels = SCRAPED | set(metric._labelnames)
            if isinstance(metric, Counter):
                names[f"{family.name}_total"] = labels
            else:
                names |= {family.name: labels, f"{family.name}_bucket": labels | {"le"}}
    return names


def error_codes(root: type[errors.ServeError] = errors.ServeError) -> set[str]:
    return {root.code}.union(*(error_codes(child) for child in root.__subclasses__()))


def test_every_series_asked_for_exists_and_has_the_labels_it_is_asked_by() -> None:
    known = LABELS | declared_series()
    wrong = [(name, labels) for name, labels in asked() if not labels <= known.get(name, set())]

    assert wrong == []
    assert len(list(asked())) > len(rules()) + len(dashboard()["panels"])


def test_every_series_of_the_server_is_on_the_dashboard() -> None:
    shown = json.dumps(dashboard())
    assert not [name for name in declared_series() if name.removesuffix("_bucket") not in shown]


def test_an_alert_has_a_severity_a_summary_and_a_runbook() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    for rule in rules():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook_url"] == f"docs/monitoring.md#{rule['alert'].lower()}"
        assert f"\n### {rule['alert']}\n" in page


def test_the_runbook_may_stand_elsewhere() -> None:
    values = {"monitoring.prometheusRule.runbookUrl": "https://docs.example.com/monitoring/"}
    [group] = render(values, scenario="production")[("PrometheusRule", "mistral-7b")]["spec"]["groups"]
    assert group["rules"][0]["annotations"]["runbook_url"] == "https://docs.example.com/monitoring#mistraldown"


def test_an_alert_watches_this_release_only() -> None:
    releases = ('namespace="mistral",inferenceservice="mistral-7b"', 'kn_service_name="mistral-7b-predictor"')
    for rule in rules():
        selectors = re.findall(r"\{(.*?)\}", rule["expr"])
        assert selectors
        for selector in selectors:
            assert 'namespace="mistral"' in selector or 'k8s_namespace_name="mistral"' in selector
            assert any(release in selector for release in (*releases, 'pod=~"mistral-7b-predictor-.*"'))


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
    assert endpoint["relabelings"][0]["regex"] == "Running"
    assert endpoint.keys() == {"port", "path", "interval", "relabelings"}
    assert endpoint["port"] == port
    assert spec["selector"]["matchLabels"] == {"serving.kserve.io/inferenceservice": "mistral-7b"}


def test_queue_proxy_is_scraped_when_asked_for() -> None:
    values = {"monitoring.podMonitor.queueProxy": True}
    endpoints = render(values, scenario="production")[("PodMonitor", "mistral-7b")]["spec"]["podMetricsEndpoints"]
    assert [endpoint["port"] for endpoint in endpoints] == ["user-port", "http-usermetric"]
    standard = render({**STANDARD, **values})[("PodMonitor", "mistral-7b")]["spec"]["podMetricsEndpoints"]
    assert [endpoint["port"] for endpoint in standard] == ["http1"]


def test_the_dashboard_is_the_file_in_the_chart() -> None:
    assert dashboard() == json.loads((CHART / "files" / "dashboard.json").read_text())


def test_two_releases_have_two_dashboards() -> None:
    [(file, text)] = render({"fullnameOverride": "other"}, scenario="production")[("ConfigMap", "other-dashboard")][
        "data"
    ].items()
    other = json.loads(text)
    assert file == "mistral-other.json"
    assert (other["uid"], other["title"]) == ("mistral-other", "Mistral 7B mistral/other")


def test_the_uid_of_a_dashboard_has_at_most_the_40_characters_that_grafana_takes() -> None:
    name = "a" * 40
    [text] = render({"fullnameOverride": name}, scenario="production")[("ConfigMap", f"{name}-dashboard")][
        "data"
    ].values()
    assert len(json.loads(text)["uid"]) == 40


def test_panels_have_titles_units_and_numbers_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["type"] == "row" or panel["fieldConfig"]["defaults"]["unit"]
