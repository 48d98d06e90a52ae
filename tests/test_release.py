"""The steps of a release that need no registry, and the linters of the workflows that run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import model_server
from charts.render_manifests import CHART, load, tool
from tests.support.scripted_model import ScriptedModel, make_app

ROOT = Path(__file__).parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
DIGEST = f"sha256:{'5' * 64}"
IMAGE = f"registry.example.com:5000/team/mistral-7b-kserve@{DIGEST}"


def release(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / ".ci" / "release.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the files that a release reads."""
    for path in (".ci/release.py", "CHANGELOG.md", "pyproject.toml", "model_server/__init__.py", "manifests/jobs"):
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / path).is_dir() else shutil.copy)(ROOT / path, target)
    shutil.copytree(CHART, tmp_path / "charts" / "mistral-7b")
    (tmp_path / "CHANGELOG.md").write_text(
        "## [Unreleased]\n\n- Not yet.\n\n"
        "## [9.8.7] - 2026-01-02\n\n### Added\n\n- A thing.\n\n"
        "## [9.8.6] - 2026-01-01\n\n- Old.\n"
    )
    return tmp_path


def test_all_files_have_one_version() -> None:
    checked = release("check", f"v{VERSION}")
    assert checked.returncode == 0, checked.stderr
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == model_server.__version__ == VERSION


def test_a_version_is_set_in_every_file_and_its_tag_is_accepted(copy: Path) -> None:
    assert release("set", "9.8.7", root=copy).returncode == 0
    checked = release("check", "v9.8.7", root=copy)
    assert checked.returncode == 0, checked.stderr
    assert yaml.safe_load((copy / "charts/mistral-7b/Chart.yaml").read_text())["appVersion"] == "9.8.7"


@pytest.mark.parametrize(
    "path", ["model_server/__init__.py", "charts/mistral-7b/Chart.yaml", "manifests/jobs/batch.yaml"]
)
def test_a_tag_is_refused_when_one_file_has_another_version(copy: Path, path: str) -> None:
    release("set", "9.8.7", root=copy)
    file = copy / path
    file.write_text(file.read_text().replace("9.8.7", "9.8.6"))
    refused = release("check", "v9.8.7", root=copy)
    assert refused.returncode == 1
    assert refused.stderr == f"The tag is v9.8.7, and {path} has version 9.8.6, whose tag is v9.8.6.\n"


def test_a_tag_is_refused_without_entries_in_the_changelog(copy: Path) -> None:
    release("set", "9.9.9", root=copy)
    assert release("check", "v9.9.9", root=copy).stderr == (
        "CHANGELOG.md has no entries under `## [9.9.9] - <date>`.\n"
    )


def test_the_notes_are_the_versions_section_alone(copy: Path) -> None:
    release("set", "9.8.7", root=copy)
    assert release("notes", root=copy).stdout == "### Added\n\n- A thing.\n"


def test_the_packaged_chart_renders_the_image_by_digest(tmp_path: Path) -> None:
    packaged = release("chart", IMAGE, str(tmp_path))
    assert packaged.returncode == 0, packaged.stderr
    package = Path(packaged.stdout.strip())
    assert package.name == f"mistral-7b-{VERSION}.tgz"

    command = [tool("helm"), "template", "mistral-7b", str(package), "--set", "hfToken.secretName=hf-token"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [service] = [o for (kind, _), o in load(rendered).items() if kind == "InferenceService"]
    [server] = service["spec"]["predictor"]["containers"]
    assert server["image"] == IMAGE


def test_a_chart_is_not_packaged_with_an_image_by_tag(tmp_path: Path) -> None:
    refused = release("chart", "registry.example.com/mistral-7b-kserve:latest", str(tmp_path))
    assert refused.returncode == 1
    assert "does not name an image by digest" in refused.stderr
    assert not [*tmp_path.iterdir()]


DOCKER = f"""#!/bin/sh
echo "$@" >> "$CALLS"
while [ $# -gt 0 ]; do
  [ "$1" = --metadata-file ] && printf '{{\\n  "containerimage.digest": "{DIGEST}"\\n}}' > "$2"
  shift
done
exit 0
"""
"""Docker's command line as far as `.ci/release-image` uses it: buildx writes the digest into its metadata file."""


def test_the_image_is_pushed_with_sbom_and_provenance_and_named_by_digest(tmp_path: Path) -> None:
    docker, calls = tmp_path / "docker", tmp_path / "calls"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls)}
    script = [str(ROOT / ".ci" / "release-image"), "registry.example.com/team/"]
    done = subprocess.run(script, env=env, capture_output=True, text=True)

    assert done.stdout == f"registry.example.com/team/mistral-7b-kserve@{DIGEST}\n", done.stderr
    build = calls.read_text().splitlines()[-1]
    for option in (
        "--platform linux/amd64",
        f"--build-arg VERSION={VERSION}",
        "--sbom=true",
        "--provenance=mode=max",
        "--push",
    ):
        assert option in build


def test_openapi_has_the_version() -> None:
    assert make_app(ScriptedModel()).version == VERSION


def test_the_workflows_have_no_finding_of_zizmor() -> None:
    command = [tool("zizmor"), "--offline", "--no-progress", str(ROOT / ".github")]
    audit = subprocess.run(command, capture_output=True, text=True)
    assert audit.returncode == 0, audit.stdout


def test_the_workflows_have_no_finding_of_actionlint() -> None:
    actionlint = shutil.which("actionlint")
    if actionlint is None:
        pytest.skip("actionlint is not installed: .ci/run installs it with Go")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it runs the shellcheck that it finds
    lint = subprocess.run([actionlint], cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout


def test_every_action_is_pinned_by_commit() -> None:
    workflows = (ROOT / ".github" / "workflows").glob("*.yml")
    used = [action for file in workflows for action in re.findall(r"uses: (\S+)", file.read_text())]
    assert used
    assert [a for a in used if not a.startswith("./") and not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", a)] == []
