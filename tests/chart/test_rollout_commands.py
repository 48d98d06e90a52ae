"""The commands of docs/rollouts.md in a shell: real Helm and kubectl against an API with KServe's traffic rule."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.upgrade_api import SERVICE, UpgradeApi

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "rollouts.md").read_text()
IMAGE = "registry.example.com/mistral-7b-kserve"
OLD, NEW = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"
OLD_IMAGE, NEW_IMAGE = f"{IMAGE}@{OLD}", f"{IMAGE}@{NEW}"
VALUES = f"""
image: {{repository: {IMAGE}, digest: "{OLD}"}}
hfToken: {{secretName: hf-token}}
"""


def commands(heading: str) -> list[str]:
    """The indented blocks of a section."""
    section = PAGE.split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    paragraphs = (paragraph.strip("\n") for paragraph in section.split("\n\n"))
    return [paragraph for paragraph in paragraphs if paragraph.startswith("    ")]


class Release:
    """A shell in a directory with the chart, the values file and the variables of the page."""

    def __init__(self, api: UpgradeApi, directory: Path) -> None:
        self.api, self.directory = api, directory
        (directory / "charts").symlink_to(ROOT / "charts")
        (directory / "values.yaml").write_text(VALUES)
        api.write_kubeconfig(directory / "kubeconfig")
        self.type("helm install mistral-7b charts/mistral-7b -n mistral -f values.yaml")
        api.become_ready()

    def type(self, command: str) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {"NEW": NEW, "OLD": OLD, "IMAGE": IMAGE, "KUBECONFIG": "kubeconfig", "HOME": str(self.directory)}
        shell = ["bash", "-euc", command]
        run = subprocess.run(
            shell, cwd=self.directory, env={**os.environ, **variables, "PATH": path}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr

    def images(self) -> list[str]:
        return [template["containers"][0]["image"] for template in self.api.knative.templates]


@pytest.fixture
def release(tmp_path: Path) -> Iterator[Release]:
    api = UpgradeApi()
    yield Release(api, tmp_path)
    api.close()


@pytest.fixture(params=["", " with kubectl"], ids=["helm", "kubectl"])
def tool(request: pytest.FixtureRequest) -> str:
    """The end of the headings of a tool's sections."""
    return request.param


@pytest.fixture
def canary(release: Release, tool: str) -> Release:
    """A release whose new image is ready and gets a tenth of the requests."""
    release.type(commands(f"### Start a canary{tool}")[0])
    release.api.become_ready()
    return release


def test_a_canary_gets_nothing_until_it_is_ready_and_then_its_share(release: Release, tool: str) -> None:
    release.type(commands(f"### Start a canary{tool}")[0])
    assert release.api.traffic() == {OLD_IMAGE: 100}

    release.api.become_ready()
    assert release.api.traffic() == {OLD_IMAGE: 90, NEW_IMAGE: 10}


def test_a_step_changes_the_share_without_a_new_revision(release: Release) -> None:
    start, step = commands("### Start a canary")
    release.type(start)
    release.api.become_ready()
    release.type(step)

    assert release.api.traffic() == {OLD_IMAGE: 50, NEW_IMAGE: 50}
    assert release.images() == [OLD_IMAGE, NEW_IMAGE]


def test_promoting_sends_every_request_to_the_new_image_without_a_new_revision(canary: Release, tool: str) -> None:
    canary.type(commands(f"### Promote{tool}")[0])

    assert canary.api.traffic() == {NEW_IMAGE: 100}
    assert canary.images() == [OLD_IMAGE, NEW_IMAGE]


def test_the_canary_after_a_promotion_falls_back_to_the_promoted_image(canary: Release, tool: str) -> None:
    canary.type(commands(f"### Promote{tool}")[0])
    third = commands(f"### Start a canary{tool}")[0].replace("$NEW", f"sha256:{'3' * 64}")
    canary.type(third)
    canary.api.become_ready()

    assert canary.api.traffic() == {NEW_IMAGE: 90, f"{IMAGE}@sha256:{'3' * 64}": 10}


def test_stopping_sends_every_request_to_the_old_image_without_a_new_revision(canary: Release, tool: str) -> None:
    canary.type(commands(f"### Stop{tool}")[0])

    assert canary.api.traffic() == {OLD_IMAGE: 100}
    assert canary.images() == [OLD_IMAGE, NEW_IMAGE]


def test_reverting_never_sends_a_request_to_the_new_image(canary: Release, tool: str) -> None:
    revert = commands(f"### Revert{tool}")
    wait = commands("### Revert")[1]

    canary.type(revert[0])
    assert canary.api.traffic() == {OLD_IMAGE: 100}
    canary.api.become_ready()
    canary.type(wait)
    assert canary.api.traffic() == {OLD_IMAGE: 100}
    canary.type(revert[-1])

    assert canary.api.traffic() == {OLD_IMAGE: 100}
    assert canary.images() == [OLD_IMAGE, NEW_IMAGE, OLD_IMAGE]
    rolled_out = canary.api.objects[SERVICE]["status"]["components"]["predictor"]["latestRolledoutRevision"]
    assert rolled_out == "mistral-7b-predictor-00003"


def test_helm_rollback_during_a_canary_sends_every_request_to_the_bad_image(release: Release) -> None:
    """Why the page forbids it."""
    release.type(commands("### Start a canary")[0])
    release.api.become_ready()
    release.type("helm rollback mistral-7b 1 -n mistral")

    assert release.api.traffic() == {NEW_IMAGE: 100}


def test_no_command_of_the_page_uses_null_reuse_values_or_helm_rollback() -> None:
    typed = "\n".join(line for line in PAGE.splitlines() if line.startswith("    "))

    assert "helm upgrade" in typed
    assert not [word for word in ("null", "--reuse-values", "rollback") if word in typed]
