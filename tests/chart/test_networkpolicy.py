"""The NetworkPolicy: which port is open to whom."""

from __future__ import annotations

import pytest

from charts.render_manifests import Object
from tests.chart.test_standard import STANDARD
from tests.support.helm import NONE, Values, render

ENABLED: Values = {"networkPolicy.enabled": True}


def policy(values: Values = NONE) -> Object:
    return render({**ENABLED, **values})[("NetworkPolicy", "mistral-7b")]["spec"]


def sources(port: int, values: Values = NONE) -> set[str]:
    """Return the namespaces that reach a port; `own` are the pods of the release's namespace."""
    found: set[str] = set()
    for rule in policy(values)["ingress"]:
        if port in {p["port"] for p in rule["ports"]}:
            for peer in rule["from"]:
                names = [e["values"] for e in peer.get("namespaceSelector", {}).get("matchExpressions", [])]
                found |= {name for values in names for name in values} or {"own"}
    return found


def test_the_policy_covers_the_pods_of_the_inference_service() -> None:
    assert policy()["podSelector"]["matchLabels"] == {"serving.kserve.io/inferenceservice": "mistral-7b"}


@pytest.mark.parametrize("port", [8012, 8013, 8112])
def test_requests_come_from_knative_and_the_gateways(port: int) -> None:
    gateways = {"istio-system", "istio-ingress", "kourier-system", "contour-external", "envoy-gateway-system"}
    assert sources(port) == {"knative-serving", "gateway-system", *gateways}


@pytest.mark.parametrize("port", [8080, 9090, 9091])
def test_metrics_are_for_prometheus_and_the_autoscaler(port: int) -> None:
    """Port 8080 is the server's, past queue-proxy and its limit of concurrent requests."""
    assert sources(port) == {"knative-serving", "monitoring"}


def test_queue_proxys_administration_is_open_to_the_kubelet_alone() -> None:
    """Whoever asks 8022 for a drain keeps the replica out of service."""
    assert sources(8022) == set()


def test_standard_mode_has_one_port_for_requests_and_metrics() -> None:
    assert {"own", "envoy-gateway-system", "monitoring"} <= sources(8080, STANDARD)
    assert sources(8012, STANDARD) == set()


def test_pods_reach_dns_and_the_download() -> None:
    assert {p["port"] for rule in policy()["egress"] for p in rule["ports"]} == {53, 443}


def test_further_rules_are_taken_as_they_are() -> None:
    balancer = {"from": [{"ipBlock": {"cidr": "10.0.0.0/16"}}], "ports": [{"port": 8012, "protocol": "TCP"}]}
    identity = {"to": [{"ipBlock": {"cidr": "169.254.170.23/32"}}], "ports": [{"port": 80}]}
    extended = policy({"networkPolicy.extraIngress": [balancer], "networkPolicy.extraEgress": [identity]})
    assert balancer in extended["ingress"]
    assert identity in extended["egress"]
