"""Renders the chart with Helm: returns the objects or Helm's error for given values, and caches each result."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from charts.render_manifests import CHART, Key, Object, helm_template, load, scenarios

SCENARIOS = sorted(scenarios())
Values = Mapping[str, Any]
"""Values by dotted path, such as `{"scaling.minReplicas": 1}`."""
NONE: Values = {}
RELEASE_NAME = "mistral-7b"


def render(
    values: Values = NONE, scenario: str | None = None, chart: Path = CHART, release: str = RELEASE_NAME
) -> dict[Key, Object]:
    """Return the objects by kind and name. The default scenario is `gfd`: the chart's defaults and a token."""
    return load(_render(json.dumps(values), scenario, chart, release))


def inference_service(values: Values = NONE, scenario: str | None = None, chart: Path = CHART) -> Object:
    """Return the only rendered InferenceService."""
    [service] = [o for (kind, _), o in render(values, scenario, chart).items() if kind == "InferenceService"]
    return service


def predictor(values: Values = NONE, scenario: str | None = None) -> Object:
    """Return the predictor of the InferenceService."""
    return inference_service(values, scenario)["spec"]["predictor"]


def container(values: Values = NONE, scenario: str | None = None) -> Object:
    """Return the server's container."""
    [container] = predictor(values, scenario)["containers"]
    return container


def environment(values: Values = NONE, scenario: str | None = None) -> dict[str, Any]:
    """Return the container's plain environment variables."""
    return {e["name"]: e.get("value") for e in container(values, scenario)["env"]}


def helm_test_pod(values: Values = NONE) -> Object:
    """Return the pod of `helm test`, a hook that `render` leaves out."""
    shown = helm_template("--values", str(scenarios()["gfd"]), *_sets(values), hooks=True)
    return load(shown)[("Pod", "mistral-7b-test")]


def notes(values: Values = NONE, scenario: str | None = None) -> str:
    """Return NOTES.txt as `helm install` prints it. No other command prints it, so a template renders it."""
    text = '{{ include "mistral-7b/templates/NOTES.txt" . | toJson }}'
    probe = f"kind: Notes\nmetadata: {{name: notes}}\ntext: {text}\n"
    return render({**values, "extraObjects": [probe]}, scenario)[("Notes", "notes")]["text"]


def refusal(values: Values, scenario: str | None = None, release: str = RELEASE_NAME) -> str:
    """Return the error with which Helm refuses the values."""
    return _refusal(json.dumps(values), scenario, release)


@cache
def _refusal(values: str, scenario: str | None, release: str) -> str:
    try:
        _render(values, scenario, CHART, release)
    except subprocess.CalledProcessError as error:
        return str(error.stderr)
    raise AssertionError(f"Helm accepted {values}")


@cache
def _render(values: str, scenario: str | None, chart: Path, release: str = RELEASE_NAME) -> str:
    arguments = ["--values", str(scenarios()[scenario or "gfd"])]
    return helm_template(*arguments, *_sets(json.loads(values)), chart=chart, release=release)


def _sets(values: Values) -> list[str]:
    """Return the Helm arguments that set the values."""
    return [part for path, value in values.items() for part in ("--set-json", f"{path}={json.dumps(value)}")]
