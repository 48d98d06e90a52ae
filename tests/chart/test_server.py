"""The server started as the chart starts it: its probes, its scrape and its `helm test` meet what they expect."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import httpx
import pytest

from charts.render_manifests import CHART
from tests.support.helm import container, environment, render
from tests.support.server_process import ServerProcess

PREDICT_TEST = (CHART / "files" / "predict_test.py").read_text()


@pytest.fixture(scope="module")
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """A server with the chart's arguments and variables, though with a model of the tests'."""
    variables = {name: value for name, value in environment(scenario="minimal-cpu").items() if value is not None}
    return start_server(*container(scenario="minimal-cpu")["args"], environ=variables)


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_each_probe_finds_its_path(server: ServerProcess, probe: str) -> None:
    assert httpx.get(server.url + container()[probe]["httpGet"]["path"]).status_code == 200


def test_the_scrape_finds_the_series(server: ServerProcess) -> None:
    spec = render(scenario="production")[("PodMonitor", "mistral-7b")]["spec"]
    answer = httpx.get(server.url + spec["podMetricsEndpoints"][0]["path"])
    assert "mistral_load_seconds" in answer.text


def test_the_port_is_the_servers_own_default() -> None:
    from model_server.settings import Settings

    assert container()["ports"][0]["containerPort"] == Settings.http_port


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run what `helm test` runs in its pod."""
    command = [sys.executable, "-I", "-c", PREDICT_TEST, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_helm_test_passes_on_a_real_answer(server: ServerProcess) -> None:
    answer = ask("mistral-7b", "30", "http://127.0.0.1:9", server.url)
    assert answer.returncode == 0, answer.stdout
    assert "generated_text" in answer.stdout


def test_helm_test_fails_when_nothing_answers_in_time() -> None:
    answer = ask("mistral-7b", "1", "http://127.0.0.1:9")
    assert answer.returncode == 1
    assert "No answer within 1 s." in answer.stdout


def test_helm_test_gives_a_wrong_model_name_until_the_end_of_its_time(server: ServerProcess) -> None:
    answer = ask("another", "1", server.url)
    assert answer.returncode == 1
    assert "404" in answer.stdout
