"""What `.github/workflows/rollout.yml` builds on: a kubeconfig whose user is the CI job itself."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import yaml

from mistral_cli.cluster import INFERENCE_SERVICE, Cluster
from tests.support.scripted_server import ScriptedServer, answer_json

ROOT = Path(__file__).parents[3]


def id_token(seconds: float) -> str:
    """Return a token as GitHub's: only its expiry is read here, and by nobody verified."""
    claims = base64.urlsafe_b64encode(json.dumps({"exp": int(time.time() + seconds)}).encode()).decode().rstrip("=")
    return f"header.{claims}.signature"


def test_the_jobs_token_is_fetched_anew_when_it_has_expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [id_token(-60), id_token(300)]
    with ScriptedServer([]) as github, ScriptedServer([]) as api:
        asked: list[str] = []

        def issue(handler: BaseHTTPRequestHandler) -> None:
            asked.append(handler.path)
            answer_json({"value": tokens[min(len(asked), 2) - 1]})(handler)

        def service(handler: BaseHTTPRequestHandler) -> None:
            authorizations.append(handler.headers["authorization"])
            answer_json({"metadata": {"name": "x"}})(handler)

        authorizations: list[str] = []
        github.pages = {"/token?v=1&audience=kubernetes": issue}
        api.pages = {INFERENCE_SERVICE.path("mistral", "x"): service}
        monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{github.url}/token?v=1")
        monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "t")
        file = tmp_path / "kubeconfig"
        settings = {"API_SERVER": api.url, "CA_CERTIFICATE": "", "AUDIENCE": "kubernetes", "CONTEXT": "rollout"}
        subprocess.run([ROOT / ".github" / "kubeconfig", file], env=os.environ | settings, check=True)
        cluster = Cluster("rollout", config_file=str(file), retries=1)
        for _ in range(2):
            cluster.get(INFERENCE_SERVICE, "mistral", "x")
        assert authorizations[-1] == f"Bearer {tokens[1]}"


def test_the_workflow_rolls_out_with_the_job_s_token_alone() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "rollout.yml").read_text())
    job = workflow["jobs"]["rollout"]
    assert workflow["permissions"] == {}
    assert job["permissions"] == {"contents": "read", "id-token": "write"}
    assert job["environment"] == "${{ inputs.environment }}"
    for step in job["steps"]:
        assert "@" not in step.get("uses", "") or len(step["uses"].partition("@")[2]) == 40
