"""Functions that run `mistral preflight` against the cluster double, a registry and a hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from charts.render_manifests import CHART
from mistral_cli.app import app
from tests.support.artifact_server import DIGEST, Artifacts, serving_artifacts
from tests.support.cluster_api.admission import AdmittingStore, cluster_that_lacks_nothing
from tests.support.cluster_api.api import CONTEXT, serve

Finding = dict[str, str]


@dataclass
class Site:
    """A cluster, its registry and hub, and the command."""

    store: AdmittingStore
    artifacts: Artifacts
    kubeconfig: Path

    def run(self, *args: str, context: str = CONTEXT) -> Result:
        """Run `mistral preflight` with these arguments."""
        env = {"KUBECONFIG": str(self.kubeconfig), "HF_ENDPOINT": f"http://{self.artifacts.host}"}
        named = ["--context", context] if context else []
        return CliRunner().invoke(app, ["preflight", *args, *named], env=env)

    def chart(self, *more: str) -> list[str]:
        """Return the arguments for the chart's `gfd` scenario with a PodMonitor and an image by digest."""
        sets = [
            f"image.repository={self.artifacts.image}",
            f"image.digest={DIGEST}",
            "monitoring.podMonitor.enabled=true",
        ]
        given = [word for each in sets for word in ("--set", each)]
        return ["--chart", str(CHART), "--values", str(CHART / "ci" / "gfd-values.yaml"), *given, *more]

    def findings(self, *more: str) -> tuple[int, list[Finding]]:
        """Return the exit code and the findings for the chart."""
        result = self.run(*self.chart(*more), "--output", "json")
        assert result.stdout, result.output
        return result.exit_code, json.loads(result.stdout)["findings"]


@contextmanager
def site(folder: Path, **artifacts: Any) -> Iterator[Site]:
    """Serve a cluster that lacks nothing, a registry and a hub."""
    store = cluster_that_lacks_nothing()
    with serving_artifacts() as held, serve(store, folder) as kubeconfig:
        for key, value in artifacts.items():
            setattr(held, key, value)
        yield Site(store, held, kubeconfig)


def of_state(found: list[Finding], state: str) -> dict[str, Finding]:
    return {finding["check"]: finding for finding in found if finding["state"] == state}
