"""A release of the chart on the cluster under test, through helm and kubectl as a person would use them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from charts.render_manifests import CHART, scenarios, tool
from tests.e2e.load import Target

NAME = "mistral-7b"
PREDICTOR = f"serving.kserve.io/inferenceservice={NAME}"


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 600) -> None:
    """Ask until `condition` holds; fail with `what` did not happen."""
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, f"after {seconds:g} s still not true: {what}"
        time.sleep(1)


@dataclass(frozen=True)
class Release:
    """One InferenceService in a namespace of its own."""

    context: str
    namespace: str
    images: tuple[str, str]
    """The same good server under two tags or digests; the first is installed."""
    gateway: str = ""
    """URL of the ingress gateway; empty: the service's own URL resolves."""
    values: str = ""
    """A file with the chart's values for this cluster, added to those of the scenario."""

    def kubectl(self, *arguments: str) -> str:
        return _run(tool("kubectl"), "--context", self.context, "--namespace", self.namespace, *arguments)

    def objects(self, kind: str, selector: str = PREDICTOR) -> list[dict[str, Any]]:
        return json.loads(self.kubectl("get", kind, "--selector", selector, "--output", "json"))["items"]

    def helm(self, *arguments: str) -> str:
        return _run(tool("helm"), "--kube-context", self.context, "--namespace", self.namespace, *arguments)

    def install(self, scenario: str = "minimal-cpu", settings: Mapping[str, str] = MappingProxyType({})) -> None:
        values = [f"--values={path}" for path in (scenarios()[scenario], self.values) if path]
        values += _sets({**image_settings(self.images[0]), **settings})
        self.helm("upgrade", "--install", NAME, str(CHART), "--create-namespace", *values)

    def wait_until_ready(self) -> None:
        self.kubectl("wait", "--for=condition=Ready", f"inferenceservice/{NAME}", "--timeout=10m")

    def upgrade(self, image: str, canary_percent: int | None = None) -> None:
        """Change the image, and the newest revision's share of requests where it is given."""
        settings = image_settings(image)
        if canary_percent is not None:
            settings["rollout.canaryTrafficPercent"] = str(canary_percent)
        self.change(settings)

    def change(self, settings: Mapping[str, str]) -> None:
        """Change values of the release."""
        self.helm("upgrade", NAME, str(CHART), "--reset-then-reuse-values", *_sets(settings))

    def uninstall(self) -> None:
        """Remove all of it, also what the chart leaves for older revisions."""
        self.helm("uninstall", NAME, "--ignore-not-found", "--wait")
        # A pod that still drains delays the end of its namespace by half its grace period, which is the timeout.
        self.kubectl("delete", "pods", "--all", "--force", "--grace-period=0")
        self.kubectl("delete", "namespace", self.namespace, "--ignore-not-found")
        for name in self.kubectl("get", "clusterstoragecontainer", "--output", "name").split():
            if f"/{self.namespace}-{NAME}" in name:
                self.kubectl("delete", name)

    @property
    def service(self) -> dict[str, Any]:
        return json.loads(self.kubectl("get", "inferenceservice", NAME, "--output", "json"))

    @property
    def image(self) -> str:
        return self.service["spec"]["predictor"]["containers"][0]["image"]

    @property
    def other_image(self) -> str:
        """The good image that is not the current one."""
        return next(image for image in self.images if image != self.image)

    @property
    def newest_revision(self) -> str:
        return self.service["status"]["components"]["predictor"].get("latestCreatedRevision", "")

    @property
    def newest_ready_revision(self) -> str:
        return self.service["status"]["components"]["predictor"].get("latestReadyRevision", "")

    @property
    def traffic(self) -> dict[str, int]:
        """The percent of each revision that gets requests."""
        targets = self.service["status"]["components"]["predictor"]["traffic"]
        shares: dict[str, int] = {}
        for target in targets:
            shares[target["revisionName"]] = shares.get(target["revisionName"], 0) + target.get("percent", 0)
        return {revision: percent for revision, percent in shares.items() if percent}

    def wait_for_traffic(self, traffic: dict[str, int], seconds: float = 600) -> None:
        wait_until(lambda: self.traffic == traffic, f"traffic is {traffic}", seconds)

    def wait_until_stopped(self, revision: str, seconds: float = 600) -> None:
        """Wait until the revision's pods have answered what they had and are gone."""
        pods = f"serving.knative.dev/revision={revision}"
        wait_until(lambda: self.objects("pod", pods) == [], f"{revision} has no pod", seconds)

    def wait_for_new_revision(self, before: str) -> str:
        """Return the name of the revision that became ready after `before`."""
        wait_until(lambda: self.newest_ready_revision != before, f"a revision after {before} is ready")
        return self.newest_ready_revision

    @property
    def target(self) -> Target:
        """Where requests go."""
        url = self.service["status"]["url"]
        host = url.partition("://")[2]
        return Target(url=f"{self.gateway or url}/v1/models/{NAME}:predict", host=host)


def image_settings(image: str) -> dict[str, str]:
    """Return the chart's values for an image by tag or by digest."""
    repository, at, digest = image.partition("@")
    if at:
        return {"image.repository": repository, "image.digest": digest}
    repository, _, tag = image.rpartition(":")
    return {"image.repository": repository, "image.tag": tag, "image.digest": ""}


def _sets(settings: Mapping[str, str]) -> list[str]:
    return [f"--set={name}={value}" for name, value in settings.items()]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
