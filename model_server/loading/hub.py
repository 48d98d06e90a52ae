"""Downloads a model's files from the Hugging Face hub: safetensors only, and every refusal is one sentence.

The token comes from `HF_TOKEN`. The checks of the files are in `checkpoint`.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import disable_progress_bars

from model_server.errors import StartupError
from model_server.telemetry.progress import Progress, in_units

log = logging.getLogger(__name__)

ALLOW_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
IGNORE_PATTERNS = ["consolidated*", "*/*"]
"""Mistral's repositories hold the weights twice: `consolidated*` has them in another layout."""


def download(model_id: str, revision: str | None = None) -> Path:
    """Return the directory that holds the model's files, downloaded unless they are cached.

    Raises:
        StartupError: the hub refuses or cannot be reached, or the files do not fit on the disk.
    """
    disable_progress_bars()
    try:
        return _download(model_id, revision)
    except errors.GatedRepoError:
        raise StartupError(
            f"{model_id} is gated: accept its terms on its page, and set HF_TOKEN to a token of that account{_token()}."
        ) from None
    except errors.RepositoryNotFoundError:
        raise StartupError(
            f"The hub knows no model {model_id}: check --model_id, or set HF_TOKEN if the model is private{_token()}."
        ) from None
    except errors.RevisionNotFoundError:
        raise StartupError(f"{model_id} has no revision {revision}: check --model_revision.") from None
    except errors.HFValidationError:
        raise StartupError(f"--model_id must be like owner/name, not {model_id!r}.") from None
    except errors.LocalEntryNotFoundError:
        raise StartupError(
            f"The hub cannot be reached and {model_id} is not in the cache {constants.HF_HUB_CACHE}: "
            "check the network, or give the files with --model_dir."
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise StartupError(f"The hub refuses access to {model_id}: check HF_TOKEN{_token()}.") from None
        raise StartupError(f"The hub answered {status} for {model_id}: try again later.") from None
    except (OSError, httpx2.HTTPError, errors.XetDownloadError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise StartupError(_disk_full(model_id)) from None
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise StartupError(
            f"{model_id} could not be downloaded to {constants.HF_HUB_CACHE} ({reason}): "
            "check the network and that the directory can be written; HF_HOME moves it."
        ) from None


def _download(model_id: str, revision: str | None) -> Path:
    try:
        files = huggingface_hub.snapshot_download(
            model_id, revision=revision, allow_patterns=ALLOW_PATTERNS, ignore_patterns=IGNORE_PATTERNS, dry_run=True
        )
        missing_bytes = sum(f.file_size or 0 for f in files if f.will_download)
    except errors.DryRunError:  # the hub cannot be reached: use the cache
        missing_bytes = 0
    if missing_bytes > _free_bytes():
        raise StartupError(_disk_full(model_id, missing_bytes))
    blobs = Path(constants.HF_HUB_CACHE, f"models--{model_id.replace('/', '--')}", "blobs")
    before_bytes = _size(blobs)
    with Progress(f"downloading {model_id}", missing_bytes, lambda: _size(blobs) - before_bytes):
        return Path(
            huggingface_hub.snapshot_download(
                model_id, revision=revision, allow_patterns=ALLOW_PATTERNS, ignore_patterns=IGNORE_PATTERNS
            )
        )


def _size(directory: Path) -> int:
    """Return the bytes of a directory's files now, unfinished downloads included."""
    total = 0
    try:
        for entry in os.scandir(directory):
            total += entry.stat().st_size
    except FileNotFoundError:  # not there yet, or just renamed: the next call sees it
        pass
    return total


def _free_bytes() -> int:
    directory = Path(constants.HF_HUB_CACHE)
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def _disk_full(model_id: str, missing_bytes: int = 0) -> str:
    needed = f" needs {in_units(missing_bytes)} and" if missing_bytes else ""
    return (
        f"{model_id}{needed} does not fit on the disk of {constants.HF_HUB_CACHE}, "
        f"where {in_units(_free_bytes())} are free: make room, or set HF_HOME to a larger disk."
    )


def _token() -> str:
    return "" if os.environ.get("HF_TOKEN") else " (it is not set)"
