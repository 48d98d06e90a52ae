"""Where the model comes from: a directory, a mount that appears late, or the hub."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from model_server.errors import StartupError
from model_server.loading import source
from model_server.settings import Settings


def test_model_must_be_named() -> None:
    with pytest.raises(StartupError, match="--model_dir"):
        source.resolve(Settings())


def test_directory_takes_precedence_over_the_hub() -> None:
    assert source.resolve(Settings(model_dir=Path("/a"), model_id="b/c")) == Path("/a")


def test_start_waits_for_the_modelcar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KServe's modelcar links /mnt/models to its own files, once they are complete."""
    files, mount = tmp_path / "modelcar", tmp_path / "models"
    files.mkdir()
    waiting = threading.Event()
    monkeypatch.setattr(source.time, "sleep", lambda seconds: waiting.set() or mount.symlink_to(files))

    assert source.resolve(Settings(model_dir=mount, model_dir_appears_late=True)) == mount
    assert waiting.is_set()
    assert mount.is_dir()


def test_modelcar_that_never_comes_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MOUNT_TIMEOUT_S", 0.01)

    with pytest.raises(StartupError, match="modelcar has not provided"):
        source.resolve(Settings(model_dir=tmp_path / "models", model_dir_appears_late=True))
