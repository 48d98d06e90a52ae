"""Checks a model's files before anything is loaded: a Mistral model, in safetensors, complete.

Reads the configuration and the headers only. Every fault is a `StartupError` that says what to do. Leaves out memory
and device (`weights`, `device`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import MistralConfig

from model_server.errors import StartupError
from model_server.loading.safetensors import StoredTensor, stored_tensors

ARCHITECTURE = "MistralForCausalLM"


def read_config(directory: Path) -> MistralConfig:
    """Return the model's configuration.

    Raises:
        StartupError: there is none, or it describes a model that this server does not serve.
    """
    if not directory.is_dir():
        raise StartupError(f"The model directory {directory} is not there: check --model_dir and its mount.")
    file = directory / "config.json"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise StartupError(f"{directory} holds no config.json: give the directory of a Hugging Face model.") from None
    except OSError as error:
        raise StartupError(f"{file} cannot be read ({error.strerror}): check its permissions.") from None
    except ValueError:
        raise StartupError(f"{file} is not valid JSON: download the model's files again.") from None
    architecture = _architecture(raw)
    if architecture != ARCHITECTURE:
        kind = "" if architecture.endswith("ForCausalLM") else ", which is not a causal language model"
        raise StartupError(f"{directory} holds {architecture}{kind}; this server serves {ARCHITECTURE} only.")
    if "quantization_config" in raw:
        raise StartupError(f"{directory} holds quantized weights: give the model's float weights instead.")
    try:
        return MistralConfig.from_dict(raw)
    except Exception as error:  # a wrong value makes the library raise anything
        raise StartupError(f"{file} does not describe a Mistral model: {one_line(error)}") from None


def _architecture(raw: Any) -> str:
    architectures = raw.get("architectures") if isinstance(raw, dict) else None
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    return "a model of unnamed architecture"


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold the weights, without duplicates.

    Raises:
        StartupError: there are none in safetensors format, or one is missing.
    """
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        return _shards(index)
    others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".safetensors", ".pt", ".pth"))
    unread = f" ({others[0]} is not read)" if others else ""
    raise StartupError(
        f"{directory} holds no model.safetensors and no model.safetensors.index.json{unread}: "
        "give the model's Hugging Face files in safetensors format."
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise StartupError(f"{index} is no index of shards: download the model's files again.") from None
    files = [index.parent / name for name in names]
    for file in files:
        if not file.is_file():
            raise StartupError(f"{file} is missing, though the index names it: download the model's files again.")
    return files


def weights_in(files: list[Path]) -> dict[str, StoredTensor]:
    """Return the weights that the files hold, by name.

    Raises:
        StartupError: a file's header is broken, or the file is shorter than its header says.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            tensors |= stored_tensors([file])
        except PermissionError:
            raise StartupError(f"{file} cannot be read: give the server's user permission to.") from None
        except (SafetensorError, OSError, ValueError):
            raise StartupError(f"{file} is broken or cut short: download it again.") from None
    return tensors


def one_line(error: Exception) -> str:
    """Return a library's error message as the end of a sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__
