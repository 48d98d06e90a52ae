"""The image, as far as its files tell: what goes into which stage, who runs, what may be sent to the build.

That it builds, runs as uid 1000 on a read-only root and stops on SIGTERM takes a builder, not a test.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from charts.render_manifests import tool

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


class Stage(NamedTuple):
    """One FROM and the instructions below it."""

    name: str
    base: str
    instructions: list[tuple[str, str]]

    def all(self, word: str) -> list[str]:
        return [rest for found, rest in self.instructions if found == word]


def stages() -> dict[str, Stage]:
    lines = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#"))
    found: dict[str, Stage] = {}
    for line in lines.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = found.setdefault(name, Stage(name, base, []))
        elif word and found:
            stage.instructions.append((word, rest.strip()))
    return found


def test_a_build_without_a_target_gives_the_server() -> None:
    last = list(stages().values())[-1]
    assert (last.base, last.instructions) == ("server", [])


def test_the_base_is_the_official_slim_python_and_can_be_pinned_by_digest() -> None:
    assert "ARG PYTHON_IMAGE=python:3.12-slim-trixie" in TEXT
    assert stages()["server"].base == stages()["dependencies"].base == "${PYTHON_IMAGE}${PYTHON_DIGEST}"


def test_the_gpus_driver_is_found_where_gke_mounts_it() -> None:
    """`/usr/local/nvidia/lib64` is not where the loader looks, and GKE has no NVIDIA container toolkit that adds it."""
    (environment,) = stages()["server"].all("ENV")

    assert "LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in environment.split()


def test_dependencies_have_a_layer_that_a_change_of_the_code_leaves_alone() -> None:
    assert stages()["dependencies"].all("COPY") == ["requirements.lock ./"]
    words = [f"{word} {rest}" for word, rest in stages()["server"].instructions]
    venv = words.index("COPY --from=dependencies /opt/venv /opt/venv")
    assert venv < words.index("COPY model_server model_server")


def test_dependencies_are_those_of_the_servers_lock_with_their_hashes() -> None:
    [install] = [run for run in stages()["dependencies"].all("RUN") if "pip install" in run]
    assert "--no-deps --require-hashes --requirement requirements.lock" in install
    assert "--no-cache-dir" in install
    assert "--only-binary :all:" in install


def test_bytecode_is_compiled_in_the_build() -> None:
    for name in ("dependencies", "server"):
        assert any("compileall" in run for run in stages()[name].all("RUN"))


def test_the_server_image_holds_no_weights_no_demo_and_no_compiler() -> None:
    server = stages()["server"]
    assert server.all("COPY") == [
        "--from=dependencies /opt/venv /opt/venv",
        "model_server model_server",
        "mistral_relay mistral_relay",
        "mistral_cli mistral_cli",
    ]
    assert not re.search(r"apt-get|apk |gcc|build-essential", TEXT)


def test_the_server_is_process_one_and_not_root() -> None:
    server = stages()["server"]
    assert server.all("ENTRYPOINT") == ['["python", "-m", "model_server"]']
    assert server.all("USER")[-1] == "1000:1000"
    assert stages()["demo"].all("USER")[-1] == "1000:1000"


def test_kserve_probes_the_container_so_docker_does_not() -> None:
    assert not any(stage.all("HEALTHCHECK") for stage in stages().values())


def test_everything_that_writes_finds_its_place_in_tmp() -> None:
    [variables] = stages()["server"].all("ENV")
    assert "HOME=/tmp " in variables
    assert "HF_HOME=/tmp/hf" in variables


def test_the_image_is_labelled() -> None:
    [labels] = stages()["server"].all("LABEL")
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels


def test_the_build_is_sent_what_it_copies_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {
        source
        for stage in stages().values()
        for copy in stage.all("COPY")
        if not copy.startswith("--from")
        for source in copy.split()[:-1]
    }
    assert sent == copied


# ---- make image, make push ----

DIGEST = f"sha256:{'5' * 64}"
DOCKER = f"""#!/bin/sh
echo "$@" >> "$CALLS"
case "$1 $2" in
  "image inspect") echo "other.example.com/mistral-7b-kserve@sha256:0"; echo "${{5%:*}}@{DIGEST}" ;;
esac
"""
"""Docker's command line as far as `.ci/image` uses it; there is no daemon and no registry here."""


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """Run `.ci/image` with the double of docker; return what it did and the calls it made."""
    docker = tmp_path / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()

    def run(*arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls)}
        done = subprocess.run([str(ROOT / ".ci" / "image"), *arguments], env=env, capture_output=True, text=True)
        return done, calls.read_text().splitlines()

    return run


def test_the_image_is_built_for_amd64_with_its_version_and_revision(image: Any) -> None:
    done, calls = image()
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    assert done.returncode == 0, done.stderr
    [build] = [call for call in calls if call.startswith("build")]
    assert "--platform linux/amd64" in build
    assert f"--build-arg VERSION={VERSION} --build-arg REVISION={revision}" in build
    assert f"--tag mistral-7b-kserve:{VERSION} ." in build
    assert "make push REGISTRY=" in done.stdout


def test_a_push_prints_the_line_that_installs_the_image_by_digest(image: Any) -> None:
    done, calls = image("registry.example.com/team/")

    assert done.returncode == 0, done.stderr
    assert f"push registry.example.com/team/mistral-7b-kserve:{VERSION}" in calls
    assert "--set image.repository=registry.example.com/team/mistral-7b-kserve" in done.stdout
    assert f"--set image.digest={DIGEST} " in done.stdout
    assert "  helm install mistral-7b charts/mistral-7b --namespace mistral" in done.stdout


def test_a_push_without_a_registry_is_refused_before_anything_is_built(image: Any) -> None:
    done, calls = image("")

    assert done.returncode == 2
    assert done.stderr == "make push needs a registry: make push REGISTRY=registry.example.com/team\n"
    assert calls == []


@pytest.mark.parametrize(
    "command", [["hadolint", "Dockerfile"], ["shellcheck", ".ci/image", ".ci/release-image", ".ci/run"]], ids=" ".join
)
def test_the_linters_find_nothing(command: list[str]) -> None:
    lint = subprocess.run([tool(command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True)

    assert lint.returncode == 0, lint.stdout
