"""Where the model's files are: a directory, KServe's mount (which may appear late), or the Hugging Face hub."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from model_server.errors import StartupError
from model_server.loading import hub
from model_server.settings import Settings

log = logging.getLogger(__name__)

MOUNT_TIMEOUT_S = 600.0
"""Time limit for a modelcar to be pulled and to link its files."""
POLL_S = 0.2


def resolve(settings: Settings) -> Path:
    """Return the directory of the model: configured, mounted by KServe, or downloaded from the hub.

    Raises:
        StartupError: no model is named, or it cannot be downloaded or found.
    """
    if settings.model_dir is not None:
        if settings.model_dir_appears_late:
            _wait_for(settings.model_dir)
        return settings.model_dir
    if settings.model_id is not None:
        return hub.download(settings.model_id, settings.model_revision)
    raise StartupError("No model is named: set --model_dir to a directory or --model_id to a Hugging Face id.")


def _wait_for(directory: Path) -> None:
    """Wait until a modelcar has linked its files; it makes the link once they are all there."""
    deadline_s = time.monotonic() + MOUNT_TIMEOUT_S
    if not directory.is_dir():
        log.info("waiting for the modelcar to provide %s (MODEL_INIT_MODE=async)", directory)
    while not directory.is_dir():
        if time.monotonic() > deadline_s:
            raise StartupError(
                f"The modelcar has not provided {directory} within {MOUNT_TIMEOUT_S:g} s: "
                "check the pod's modelcar container and its image."
            )
        time.sleep(POLL_S)
