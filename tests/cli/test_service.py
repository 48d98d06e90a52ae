"""`mistral predict --service`: an InferenceService by name, through the cluster's API."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mistral_cli import endpoint
from mistral_cli.app import app
from mistral_cli.exit_codes import Misused, Unreachable
from tests.support.scripted_server import (
    Act,
    ScriptedServer,
    answer_json,
    hang_up,
    predictions,
)


def inference_service(**status: object) -> Callable[[str, str], dict[str, object]]:
    return lambda namespace, name: {"metadata": {"namespace": namespace, "name": name}, "status": status}


def test_a_service_is_asked_at_the_url_of_its_status() -> None:
    found = endpoint.from_service("ml/mistral", None, inference_service(url="https://mistral.ml.example.com"))
    assert found == endpoint.Endpoint("https://mistral.ml.example.com")


def test_an_ingress_is_asked_with_the_host_of_the_status() -> None:
    get = inference_service(url="https://mistral.ml.example.com/serving/ml")
    plain = endpoint.from_service("ml/mistral", "localhost:8081", get)
    safe = endpoint.from_service("ml/mistral", "https://10.0.0.1", get)
    assert plain.url("/v1/models") == "http://localhost:8081/serving/ml/v1/models"
    assert (plain.headers, plain.extensions) == ({"Host": "mistral.ml.example.com"}, {})
    assert safe.extensions == {"sni_hostname": "mistral.ml.example.com"}


@pytest.mark.parametrize("name", ["mistral", "/mistral", "ml/", "ml/a/b"])
def test_a_service_is_named_with_its_namespace(name: str) -> None:
    with pytest.raises(Misused, match="NAMESPACE/NAME"):
        endpoint.from_service(name, None, inference_service(url="http://a"))


def test_a_service_without_a_url_says_why() -> None:
    waiting = {"type": "Ready", "status": "False", "message": "0/3 nodes have a GPU"}
    with pytest.raises(Unreachable, match="no URL yet: 0/3 nodes have a GPU"):
        endpoint.from_service("ml/mistral", None, inference_service(conditions=[waiting]))


KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: c
contexts: [{name: c, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "%s"}}]
users: [{name: u, user: {token: t}}]
"""
SERVICE_PATH = "/apis/serving.kserve.io/v1beta1/namespaces/ml/inferenceservices/mistral"


def test_a_service_is_found_in_a_cluster_and_reached_through_an_ingress(tmp_path: Path) -> None:
    with ScriptedServer([predictions("from the cluster")]) as server:
        server.pages[SERVICE_PATH] = answer_json({"status": {"url": "http://mistral.ml.example.com"}})
        (tmp_path / "config").write_text(KUBECONFIG % server.url)
        args = [sys.executable, "-m", "mistral_cli", "predict", "hi"]
        args += ["--service", "ml/mistral", "--ingress", server.url]
        output = subprocess.check_output(args, env=os.environ | {"KUBECONFIG": str(tmp_path / "config")})
    assert output == b"from the cluster\n"
    assert server.asked[0].headers["host"] == "mistral.ml.example.com"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (answer_json({"kind": "Status"}, 404), "There is no InferenceService mistral in namespace ml"),
        (answer_json({"kind": "Status"}, 403), "does not let you read"),
        (hang_up, "does not answer"),
    ],
    ids=["404", "403", "dropped"],
)
def test_a_cluster_that_does_not_help_exits_with_5(answer: Act, sentence: str, tmp_path: Path) -> None:
    with ScriptedServer([]) as server:
        server.pages[SERVICE_PATH] = answer
        (tmp_path / "config").write_text(KUBECONFIG % server.url)
        args = [sys.executable, "-m", "mistral_cli", "predict", "hi", "--service", "ml/mistral"]
        run = subprocess.run(
            args, env=os.environ | {"KUBECONFIG": str(tmp_path / "config")}, capture_output=True, text=True
        )
    assert run.returncode == 5
    assert sentence in run.stderr


def test_without_the_kubernetes_package_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    result = CliRunner().invoke(app, ["predict", "hi", "--service", "ml/mistral"])
    assert result.exit_code == 5
    assert "pip install kubernetes" in result.stderr
