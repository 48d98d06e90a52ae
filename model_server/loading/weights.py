"""A model from disk to memory, once it is known to fit.

Owns the device, the number format and the length that a start resolves to, each with its reason. Code that
lies beside the weights is never run. Leaves out the download (`hub.py`), the checks of the files (`checkpoint.py`), the
reading (`reader.py`) and what is done with the model afterwards.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from model_server.compute.fused_linear import fuse
from model_server.errors import StartupError
from model_server.loading import checkpoint, hub
from model_server.loading.safetensors import StoredTensor, read_all
from model_server.settings import Settings
from model_server.telemetry.progress import Progress, in_units
from model_server.text.tokenizer import Text

log = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")

Wanted = dict[str, tuple[StoredTensor, Tensor]]


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
    config = checkpoint.read_config(directory)
    max_model_len, length_reason = _resolve_max_model_len(settings, config.max_position_embeddings)
    stored = checkpoint.weights_in(checkpoint.weight_files(directory))
    num_parameters = sum(tensor.num_elements for tensor in stored.values())
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
    model = _read_model(directory, config, stored, dtype, device, weight_bytes)
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


def _empty_model(config: MistralConfig, dtype: torch.dtype, device: torch.device) -> MistralForCausalLM:
    """Return the model with memory for its weights, laid out as the runner computes with them, and nothing in it."""
    with init_empty_weights(include_buffers=False):
        model = MistralForCausalLM(config)
    model.to(dtype)
    fuse(model, device)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))
    model.tie_weights()
    # Positions stay in float32, whatever the weights are.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval().requires_grad_(False)


def _match(directory: Path, model: MistralForCausalLM, stored: dict[str, StoredTensor]) -> Wanted:
    """Return, for each of the model's weights, where it lies and where it goes.

    Raises:
        StartupError: one is missing or has another shape.
    """
    wanted = {}
    for name, parameter in model.named_parameters():
        found = stored.get(name)
        if found is None:
            raise StartupError(f"The weights in {directory} lack {name}: download the model's files again.")
        if found.shape != tuple(parameter.shape):
            raise StartupError(
                f"The weights in {directory} have another shape for {name}, {list(found.shape)}, than config.json "
                f"says, {list(parameter.shape)}: download the model's files again."
            )
        wanted[name] = (found, parameter.data)
    return wanted


def _read_model(
    directory: Path,
    config: MistralConfig,
    stored: dict[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
    weight_bytes: int,
) -> MistralForCausalLM:
    done_bytes = 0

    def count(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes

    try:
        model = _empty_model(config, dtype, device)
        wanted = _match(directory, model, stored)
        total_bytes = sum(tensor.num_bytes for tensor, _ in wanted.values())
        with Progress("loading weights", total_bytes, lambda: done_bytes):
            read_all(wanted, count)
    except (torch.OutOfMemoryError, MemoryError):
        raise StartupError(_too_large(directory, weight_bytes, None, device)) from None
    except OSError as error:
        raise StartupError(f"The weights in {directory} cannot be read: {checkpoint.one_line(error)}") from None
    if (directory / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise StartupError(
                f"{directory / 'generation_config.json'} cannot be read: {checkpoint.one_line(error)}"
            ) from None
    return model


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
