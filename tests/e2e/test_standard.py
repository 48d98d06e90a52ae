"""Standard mode: KServe's own canary on a second Deployment, run by `mistral rollout` in a pod with CI's rights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.cluster import NAME, Release, wait_until
from tests.e2e.load import ask, failures, under_load
from tests.e2e.test_models import DOWNLOAD, MODEL
from tests.e2e.test_rollout import FAULTY_IMAGE, PROMOTED, REVERTED

RIGHTS = Path(__file__).parents[2] / "manifests" / "ci" / "rollout.yaml"
GATEWAY = os.environ.get("E2E_STANDARD_GATEWAY", "")
KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "clusters": [
        {
            "name": "here",
            "cluster": {
                "server": "https://kubernetes.default.svc",
                "certificate-authority": "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt",
            },
        }
    ],
    "users": [{"name": "ci", "user": {"tokenFile": "/var/run/secrets/kubernetes.io/serviceaccount/token"}}],
    "contexts": [{"name": "here", "context": {"cluster": "here", "user": "ci"}}],
}


@pytest.fixture(scope="module")
def standard(make_release: Callable[[str], Release]) -> Release:
    """The CPU scenario in Standard mode, behind a gateway of the Gateway API. KServe's canary needs a `storage.uri`."""
    release = make_release("-standard")
    if "httproutes" not in release.kubectl("api-resources") or not GATEWAY:
        pytest.skip("the cluster has no Gateway API, or E2E_STANDARD_GATEWAY does not name its gateway")
    settings = {"inferenceService.mode": "Standard", "scaling.minReplicas": "1", "scaling.maxReplicas": "1"}
    settings |= {"scaling.standard.autoscaler": "none", **DOWNLOAD, "storage.uri": f"{MODEL}:one"}
    release = replace(release, gateway=GATEWAY)
    release.install(settings=settings)
    wait_until(lambda: release.objects("deployment") != [], "KServe has made the Deployment")
    ready = "--for=jsonpath={.status.readyReplicas}=1"
    release.kubectl("wait", ready, f"deployment/{NAME}-predictor", "--timeout=10m")
    wait_until(lambda: failures([ask(release.target)]) == [], "the gateway has the new HTTPRoute")
    release.kubectl("apply", "--filename", str(RIGHTS))
    release.kubectl("create", "configmap", "kubeconfig", f"--from-literal=config={yaml.safe_dump(KUBECONFIG)}")
    return release


def deploy_in_a_pod(release: Release, image: str, name: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the result of a rollout whose runner is a pod: single versions have hosts only there."""
    command = ["python", "-m", "mistral_cli", "rollout", "deploy", NAME, "--image", image, "--context", "here"]
    command += ["--namespace", release.namespace, "--output", "json", "--timeout", "12m"]
    spec = {
        "serviceAccountName": "mistral-rollout",
        "automountServiceAccountToken": True,
        "restartPolicy": "Never",
        "volumes": [{"name": "kubeconfig", "configMap": {"name": "kubeconfig"}}],
        "containers": [
            {
                "name": "runner",
                "image": release.images[0],
                "command": command,
                "env": [{"name": "KUBECONFIG", "value": "/kubeconfig/config"}],
                "volumeMounts": [{"name": "kubeconfig", "mountPath": "/kubeconfig"}],
            }
        ],
    }
    release.kubectl("run", name, f"--image={release.images[0]}", f"--overrides={json.dumps({'spec': spec})}")

    def pod() -> dict[str, Any]:
        return json.loads(release.kubectl("get", "pod", name, "--output", "json"))["status"]

    wait_until(lambda: pod()["phase"] in ("Succeeded", "Failed"), f"the runner {name} has ended", 900)
    log = release.kubectl("logs", name)
    print(log)
    [container] = pod()["containerStatuses"]
    return container["state"]["terminated"]["exitCode"], json.loads(
        next(line for line in log.splitlines() if line.startswith("{"))
    )  # among the lines of stderr


def test_a_standard_release_answers_through_the_gateway(standard: Release) -> None:
    assert failures([ask(standard.target), ask(standard.target, stream=True)]) == []


def test_a_bad_standard_canary_is_dropped(standard: Release) -> None:
    good = standard.image

    with under_load(standard.target, clients=2) as answers:
        code, result = deploy_in_a_pod(standard, FAULTY_IMAGE.format(fault="nonsense"), "bad")

    assert (code, result["result"]) == (REVERTED, "reverted")
    assert failures(answers) == []
    assert standard.image == good


def test_a_good_standard_canary_is_promoted_without_losing_a_request(standard: Release) -> None:
    image = standard.other_image

    with under_load(standard.target, clients=2) as answers:
        code, result = deploy_in_a_pod(standard, image, "good")

    assert (code, result["result"]) == (PROMOTED, "promoted")
    assert failures(answers) == []
    assert standard.image == image
