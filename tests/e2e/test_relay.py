"""The relay of asynchronous requests, as the chart installs it beside the model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from charts.render_manifests import tool
from tests.e2e.cluster import Release, wait_until
from tests.e2e.load import ask


def relay(release: Release, path: str, body: dict[str, Any] | None = None) -> Any:
    """Return the relay's answer, through the API server: the chart gives the relay no Ingress."""
    url = f"/api/v1/namespaces/{release.namespace}/services/http:mistral-7b-relay:http/proxy{path}"
    command = [tool("kubectl"), "--context", release.context, "get" if body is None else "create", "--raw", url]
    if body is not None:
        command += ["--filename", "-"]
    done = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_asynchronous_request_is_answered_through_the_relay(make_release: Callable[[str], Release]) -> None:
    release = make_release("-relay")
    if release.kubectl("get", "storageclass", "--output", "name") == "":
        pytest.skip("the cluster has no StorageClass for the relay's volume")
    release.install(settings={"relay.enabled": "true"})
    release.wait_until_ready()
    release.kubectl("rollout", "status", "deployment/mistral-7b-relay", "--timeout=10m")
    prompt = {"prompt": "How do I install the chart?", "temperature": 0, "max_new_tokens": 16}

    request = relay(release, "/production/async_predict", {"model_input": prompt})["request_id"]

    found: dict[str, Any] = {}

    def finished() -> bool:
        found.update(relay(release, f"/async_request/{request}"))
        return found["status"] not in ("QUEUED", "IN_PROGRESS")

    wait_until(finished, "the relay has the answer")
    assert found["status"] == "SUCCEEDED", found
    assert ask(release.target).text in json.dumps(found["data"])
    release.uninstall()
