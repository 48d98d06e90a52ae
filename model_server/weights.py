"""A model from disk to memory, once it is known to fit.

Owns the device, the number format and the length that a start resolves to, each with its reason. Code that
lies beside the weights is never run. Leaves out the download (`hub.py`), the checks of the files
(`checkpoint.py`) and what is done with the model afterwards.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors import SafetensorError
from transformers import MistralConfig, MistralForCausalLM

from . import checkpoint, hub
from .errors import StartupError
from .progress import Progress, in_units
from .settings import Settings
from .text import Text

log = logging.getLogger(__name__)

READ_BYTES = 16 * 2**20
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, and what was resolved on the way."""

    model: MistralForCausalLM
    text: Text
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    """Prompt and answer together, in tokens."""
    num_parameters: int
    weight_bytes: int
    load_seconds: float
    reasons: tuple[str, ...]
    """One sentence for each thing resolved, for the log."""


def resolve(settings: Settings) -> Path:
    """Return the directory of the model: given, mounted by KServe, or downloaded from the hub.

    Raises:
        StartupError: no model is named, or it cannot be had.
    """
    if settings.model_dir is not None:
        return settings.model_dir
    if settings.model_id is not None:
        return hub.download(settings.model_id, settings.model_revision)
    raise StartupError("No model is named: set --model_dir to a directory or --model_id to a Hugging Face id.")


def load(directory: Path, settings: Settings) -> LoadedModel:
    """Check the files, then the room for them, then read them.

    Raises:
        StartupError: the files are not a Mistral model we can serve, or do not fit.
    """
    began_s = time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    config = checkpoint.read_config(directory)
    max_model_len, length_reason = _resolve_max_model_len(settings, config.max_position_embeddings)
    files = checkpoint.weight_files(directory)
    num_parameters = checkpoint.count_parameters(files)
    device, device_reason = _resolve_device()
    dtype, dtype_reason = _resolve_dtype(settings.dtype, device)
    weight_bytes = num_parameters * dtype.itemsize
    available_bytes = free_bytes(device)
    if weight_bytes > available_bytes:
        raise StartupError(_too_large(directory, weight_bytes, available_bytes, device))
    text = Text.load(directory)
    if len(text.tokenizer) > config.vocab_size:
        raise StartupError(
            f"The tokenizer in {directory} has {len(text.tokenizer)} tokens, the model {config.vocab_size}: "
            "give the tokenizer that the model was trained with."
        )
    with _reading(files):
        model = _read_model(directory, config, dtype, device, weight_bytes)
    return LoadedModel(
        model=model,
        text=text,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        load_seconds=time.monotonic() - began_s,
        reasons=(
            f"device {device}: {device_reason}",
            f"dtype {_name(dtype)}: {dtype_reason}",
            f"max_model_len {max_model_len}: {length_reason}",
            f"attention {model.config._attn_implementation}: Transformers' choice for this model and device",
            f"model: {num_parameters:,} parameters, {in_units(weight_bytes)} "
            f"of {in_units(available_bytes)} that were free",
        ),
    )


def _resolve_max_model_len(settings: Settings, allowed: int) -> tuple[int, str]:
    if settings.max_model_len <= allowed:
        chosen = "as asked for" if "max_model_len" in settings.given else "the default"
        return settings.max_model_len, f"{chosen}; the model allows {allowed}"
    if "max_model_len" in settings.given:
        raise StartupError(
            f"--max_model_len must be at most {allowed}, as the model allows, not {settings.max_model_len}."
        )
    return allowed, f"the most that the model allows, less than the default {settings.max_model_len}"


def _resolve_device() -> tuple[torch.device, str]:
    if torch.cuda.is_available():
        return torch.device("cuda:0"), torch.cuda.get_device_name(0)
    return torch.device("cpu"), "no CUDA device was found"


def _resolve_dtype(choice: str, device: torch.device) -> tuple[torch.dtype, str]:
    if choice != "auto":
        return getattr(torch, choice), "as asked for"
    if device.type == "cuda":
        return torch.float16, "the default on CUDA"
    if cpu_computes_bfloat16(Path("/proc/cpuinfo")):
        return torch.bfloat16, "this CPU computes it natively"
    return torch.float32, "this CPU does not compute bfloat16 natively"


def cpu_computes_bfloat16(cpuinfo: Path) -> bool:
    """Say whether the CPU has instructions for bfloat16: AVX-512 BF16 or AMX on x86, BF16 on ARM."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on the device; on a CPU at most what the container may still use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used = int((CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):  # no container, no limit ("max"), or an older kernel
        return free
    return min(free, limit - used)


def _too_large(directory: Path, weight_bytes: int, available_bytes: int | None, device: torch.device) -> str:
    free = "" if available_bytes is None else f" and {in_units(available_bytes)} are free"
    return (
        f"The weights in {directory} need {in_units(weight_bytes)} of memory on {device}{free}: "
        "give the container more, or use a smaller --dtype or model."
    )


@contextmanager
def _reading(files: list[Path]) -> Iterator[None]:
    """Log how far the files are read, by reading them ahead.

    Transformers maps the files and faults them in piece by piece. Reading them in order fills the page cache
    faster, and is where it is known how many bytes have come.
    """
    ended = threading.Event()
    done_bytes = 0

    def read_ahead() -> None:
        nonlocal done_bytes
        buffer = bytearray(READ_BYTES)
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while not ended.is_set() and (count := stream.readinto(buffer)):
                    done_bytes += count

    reader = threading.Thread(target=read_ahead, name="read-ahead", daemon=True)
    reader.start()
    try:
        with Progress("loading weights", sum(f.stat().st_size for f in files), lambda: done_bytes):
            yield
    finally:
        ended.set()
        reader.join()


def _read_model(
    directory: Path, config: MistralConfig, dtype: torch.dtype, device: torch.device, weight_bytes: int
) -> MistralForCausalLM:
    try:
        loaded: Any = MistralForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            device_map={"": device} if device.type == "cuda" else None,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below; the library's own error is a page long
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise StartupError(_too_large(directory, weight_bytes, None, device)) from None
    except (SafetensorError, OSError) as error:
        raise StartupError(f"The weights in {directory} cannot be read: {checkpoint.one_line(error)}") from None
    model, report = loaded
    # The library fills what is missing with random numbers and goes on; that is not the model asked for.
    for fault, verb in (
        ("missing_keys", "lack"),
        ("mismatched_keys", "have another shape than config.json says for"),
    ):
        if report[fault]:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[fault])
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise StartupError(f"The weights in {directory} {verb} {names[0]}{more}: download the model's files again.")
    return model.eval().requires_grad_(False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
