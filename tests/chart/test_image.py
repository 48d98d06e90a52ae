"""The image, as far as its files tell: what goes into which stage, who runs, what may be sent to the build.

That it builds, runs as uid 1000 on a read-only root and stops on SIGTERM takes a builder, not a test.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


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
    assert "ARG PYTHON_IMAGE=python:3.11-slim-bookworm" in TEXT
    assert stages()["server"].base == stages()["dependencies"].base == "${PYTHON_IMAGE}${PYTHON_DIGEST}"


def test_dependencies_have_a_layer_that_a_change_of_the_code_leaves_alone() -> None:
    assert stages()["dependencies"].all("COPY") == ["pyproject.toml requirements.lock ./"]
    words = [f"{word} {rest}" for word, rest in stages()["server"].instructions]
    venv = words.index("COPY --from=dependencies /opt/venv /opt/venv")
    assert venv < words.index("COPY model_server model_server")


def test_dependencies_are_the_projects_at_the_versions_of_the_lock() -> None:
    [install] = [run for run in stages()["dependencies"].all("RUN") if "pip install" in run]
    assert '["project"]["optional-dependencies"]["server"]' in install
    assert "--constraint requirements.lock" in install
    assert "--no-cache-dir" in install
    assert "--only-binary :all:" in install


def test_bytecode_is_compiled_in_the_build() -> None:
    for name in ("dependencies", "server"):
        assert any("compileall" in run for run in stages()[name].all("RUN"))


def test_the_server_image_holds_no_weights_no_demo_and_no_compiler() -> None:
    server = stages()["server"]
    assert server.all("COPY") == ["--from=dependencies /opt/venv /opt/venv", "model_server model_server"]
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
