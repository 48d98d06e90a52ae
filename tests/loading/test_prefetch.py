"""Prefetching: the weights once, within memory, and without an error of its own."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from model_server.loading import prefetch


def test_weights_are_prefetched_once_and_within_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised = []
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(b"x" * 1000)
    monkeypatch.setattr(prefetch, "psutil", SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=3000)))
    monkeypatch.setattr(
        prefetch.os, "posix_fadvise", lambda fd, start, length, advice: advised.append((start, length, advice))
    )

    prefetch.prefetch_weights(tmp_path).join()

    assert advised == [(0, 1000, os.POSIX_FADV_WILLNEED), (0, 500, os.POSIX_FADV_WILLNEED)]


def test_missing_or_unreadable_weights_are_left_to_the_loader(tmp_path: Path) -> None:
    prefetch.prefetch_weights(tmp_path / "missing").join()
    (tmp_path / "model.safetensors").mkdir()
    prefetch.prefetch_weights(tmp_path).join()
