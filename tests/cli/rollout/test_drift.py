"""What a promotion says to do next, so that the owner of the object agrees with the cluster."""

from __future__ import annotations

import shlex
import subprocess

import pytest
import yaml

from charts.render_manifests import CHART, scenarios, tool
from mistral_cli.rollout.planning import drift

DIGEST = "sha256:" + "a" * 64
SERVICE = {
    "metadata": {
        "name": "mistral-7b",
        "namespace": "mistral",
        "labels": {"app.kubernetes.io/managed-by": "Helm"},
        "annotations": {"meta.helm.sh/release-name": "mistral-7b"},
    }
}


@pytest.mark.parametrize(
    "image", [f"registry.example.com:5000/team/server@{DIGEST}", "dev.local/mistral-7b-kserve:demo2"]
)
def test_the_helm_command_after_a_promotion_renders_the_promoted_image(image: str) -> None:
    said = drift.advice(SERVICE, image)
    assert said is not None
    assert "-n mistral " in said
    values = shlex.split(said.partition(" --reset-then-reuse-values ")[2])
    scenario = f"--values={scenarios()['minimal-cpu']}"

    command = [tool("helm"), "template", "mistral-7b", str(CHART), scenario, *values]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    (service,) = (each for each in yaml.safe_load_all(done.stdout) if each and each["kind"] == "InferenceService")
    assert service["spec"]["predictor"]["containers"][0]["image"] == image
