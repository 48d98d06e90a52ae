"""The script of the cache Job, run as the Job runs it, with a download of the test's making."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from charts.render_manifests import CHART
from tests.support.helm import render

A, B, C = ("a" * 12, "b" * 12, "c" * 12)
CONFIG = 'mkdir -p "$2"; echo "{}" > "$2/config.json"'


class Volume:
    """A cache volume and the Job's script."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.initializer = root.parent / "initializer"

    def fill(self, name: str, download: str = CONFIG, kept: int = 1) -> subprocess.CompletedProcess[str]:
        [job] = [o for (kind, _), o in render(scenario="pvc-cache").items() if kind == "Job"]
        download_container = job["spec"]["template"]["spec"]["containers"][0]
        assert download_container["command"] == ["python3", "-c"]
        script = download_container["args"][0]
        assert script == (CHART / "files" / "fill_cache.py").read_text()
        self.initializer.write_text(f"#!/bin/sh\n{download}\n")
        self.initializer.chmod(0o755)
        script = script.replace("/storage-initializer/scripts/initializer-entrypoint", str(self.initializer))
        command = [sys.executable, "-I", "-c", script, "hf://a/b", str(self.root / name), str(kept)]
        return subprocess.run(command, capture_output=True, text=True)

    def names(self) -> set[str]:
        return {path.name for path in self.root.iterdir()}


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    root = tmp_path / "cache"
    root.mkdir()
    return Volume(root)


def safetensors(path: Path, data: bytes = b"1234") -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_the_weights_are_shown_only_when_all_are_there(volume: Volume) -> None:
    (volume.root / A).mkdir()  # the kubelet makes it for a replica that started first
    assert volume.fill(A, f"{CONFIG}; exit 1").returncode != 0
    assert not list((volume.root / A).iterdir())
    assert volume.fill(A).returncode == 0
    assert (volume.root / A / "config.json").exists()


def test_a_second_try_finds_what_the_first_one_left(volume: Volume) -> None:
    assert volume.fill(A, 'mkdir -p "$2"; touch "$2/shard.incomplete"; exit 1').returncode != 0
    assert volume.fill(A, f'[ -e "$2/shard.incomplete" ] && {CONFIG}').returncode == 0


def test_a_full_cache_is_not_filled_again(volume: Volume) -> None:
    volume.fill(A)
    assert volume.fill(A, "exit 1").returncode == 0


@pytest.mark.parametrize("damage", ["truncated", "no header"])
def test_damaged_weights_are_not_shown_and_are_downloaded_again(volume: Volume, damage: str) -> None:
    whole = volume.root.parent / "whole.safetensors"
    safetensors(whole)
    cut = volume.root.parent / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-2] if damage == "truncated" else b"\x05\0\0\0\0\0\0\0<html")
    refused = volume.fill(A, f'{CONFIG}; cp {cut} "$2/model.safetensors"')
    assert refused.returncode != 0
    assert "model.safetensors has" in refused.stdout
    assert not (volume.root / A).exists()
    again = f'[ ! -e "$2/model.safetensors" ] && cp {whole} "$2/model.safetensors"'
    assert volume.fill(A, again).returncode == 0


def test_a_shard_that_the_index_lists_must_be_there(volume: Volume) -> None:
    index = volume.root.parent / "index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    refused = volume.fill(A, f'{CONFIG}; cp {index} "$2/model.safetensors.index.json"')
    assert "model-00001-of-00001.safetensors is missing" in refused.stdout
    assert refused.returncode != 0


@pytest.mark.parametrize("right", [True, False])
def test_weights_have_the_hash_that_the_hub_gave(volume: Volume, right: bool) -> None:
    whole = volume.root.parent / "whole.safetensors"
    safetensors(whole)
    expected = hashlib.sha256(whole.read_bytes()).hexdigest() if right else "0" * 64
    note = volume.root.parent / "note"
    note.write_text(f"commit\n{expected}\n1.0\n")
    notes = '"$2/.cache/huggingface/download"'
    download = (
        f'{CONFIG}; mkdir -p {notes}; cp {note} {notes}/model.safetensors.metadata; cp {whole} "$2/model.safetensors"'
    )
    assert (volume.fill(A, download).returncode == 0) == right


def test_versions_that_nobody_asked_for_lately_make_room(volume: Volume) -> None:
    (volume.root / "lost+found").mkdir()
    for age, name in [(300, A), (200, B)]:
        volume.fill(name, kept=2)
        aged = (volume.root / name).stat().st_mtime - age
        os.utime(volume.root / name, (aged, aged))
    volume.fill(C, kept=1)
    assert volume.names() == {B, C, "lost+found"}


def test_a_version_that_is_asked_for_again_stays(volume: Volume) -> None:
    for age, name in [(300, A), (200, B)]:
        volume.fill(name, kept=2)
        aged = (volume.root / name).stat().st_mtime - age
        os.utime(volume.root / name, (aged, aged))
    volume.fill(A)
    volume.fill(C, kept=1)
    assert volume.names() == {A, C}
