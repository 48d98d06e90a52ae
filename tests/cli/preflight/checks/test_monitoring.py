"""A Prometheus selects the release's monitors by their labels."""

from __future__ import annotations

import pytest

from mistral_cli.objects import Object
from mistral_cli.preflight.checks import monitoring


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "2"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "Exists"}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "DoesNotExist"}]}, True),
    ],
)
def test_a_label_selector_is_applied_as_kubernetes_does(selector: Object, selected: bool) -> None:
    assert monitoring.matches(selector, {"a": "1"}) is selected
