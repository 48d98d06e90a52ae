"""Reads a model from disk to memory, after checking that it fits.

Owns the checks before reading (length, memory, tokenizer) and the model's tensors. Code that lies beside the weights is
never run. The checks of the files are in `checkpoint`, the device in `device`, the reading in `safetensors`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from model_server.compute.fused_linear import fuse
from model_server.errors import StartupError
from model_server.loading import checkpoint
from model_server.loading.device import free_bytes, resolve_device, resolve_dtype
from model_server.loading.safetensors import StoredTensor, read_all
from model_server.settings import Settings
from model_server.telemetry.progress import Progress, in_units
from model_server.text.tokenizer import Text

Targets = dict[str, tuple[StoredTensor, Tensor]]


@dataclass(frozen=True)
class LoadedModel:
    """A model that can generate, and the values chosen at the start."""

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
    """One sentence for each chosen value, for the log."""


def load(directory: Path, settings: Settings) -> LoadedModel:
    """Check the files, then that they fit into memory, then read them.

    Raises:
        StartupError: the files are not a Mistral model that this server can serve, or do not fit.
    """
    began_s = time.monotonic()
    config = checkpoint.read_config(directory)
    max_model_len, length_reason = _resolve_max_model_len(settings, config.max_position_embeddings)
    stored = checkpoint.weights_in(checkpoint.weight_files(directory))
    num_parameters = sum(tensor.num_elements for tensor in stored.values())
    device, device_reason = resolve_device()
    dtype, dtype_reason = resolve_dtype(settings.dtype, device)
    weight_bytes = num_parameters * dtype.itemsize
    available_bytes = free_bytes(device)
    if weight_bytes > available_bytes:
        raise StartupError(_too_large(directory, weight_bytes, available_bytes, device))
    text = Text.load(directory, fix_chat_template=settings.fix_chat_template)
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
            f"prompts of chats: {_prompts_of_chats(text)}",
            f"attention {model.config._attn_implementation}: Transformers' choice for this model and device",
            f"model: {num_parameters:,} parameters, {in_units(weight_bytes)} "
            f"of {in_units(available_bytes)} that were free",
        ),
    )


def _prompts_of_chats(text: Text) -> str:
    if text.fixes_chat_template:
        return "Mistral 7B v0.3's own format; the checkpoint's chat template is known to miss it"
    return "the checkpoint's chat template" if text.tokenizer.chat_template else "none; it has no chat template"


def _resolve_max_model_len(settings: Settings, limit: int) -> tuple[int, str]:
    if settings.max_model_len <= limit:
        why = "as configured" if "max_model_len" in settings.given else "the default"
        return settings.max_model_len, f"{why}; the model allows {limit}"
    if "max_model_len" in settings.given:
        raise StartupError(
            f"--max_model_len must be at most {limit}, as the model allows, not {settings.max_model_len}."
        )
    return limit, f"the most that the model allows, less than the default {settings.max_model_len}"


def _too_large(directory: Path, weight_bytes: int, available_bytes: int | None, device: torch.device) -> str:
    free = "" if available_bytes is None else f" and {in_units(available_bytes)} are free"
    return (
        f"The weights in {directory} need {in_units(weight_bytes)} of memory on {device}{free}: "
        "give the container more, or use a smaller --dtype or model."
    )


def _empty_model(config: MistralConfig, dtype: torch.dtype, device: torch.device) -> MistralForCausalLM:
    """Return the model with uninitialised weights, fused as the runner computes with them."""
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
    # The rotary embedding stays in float32, whatever the weights are.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval().requires_grad_(False)


def _match(directory: Path, model: MistralForCausalLM, stored: dict[str, StoredTensor]) -> Targets:
    """Return, for each of the model's weights, where it is stored and the memory to read it into.

    Raises:
        StartupError: one is missing or has another shape.
    """
    targets = {}
    for name, parameter in model.named_parameters():
        tensor = stored.get(name)
        if tensor is None:
            raise StartupError(f"The weights in {directory} lack {name}: download the model's files again.")
        if tensor.shape != tuple(parameter.shape):
            raise StartupError(
                f"The weights in {directory} have another shape for {name}, {list(tensor.shape)}, than config.json "
                f"says, {list(parameter.shape)}: download the model's files again."
            )
        targets[name] = (tensor, parameter.data)
    return targets


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
        targets = _match(directory, model, stored)
        total_bytes = sum(tensor.num_bytes for tensor, _ in targets.values())
        with Progress("loading weights", total_bytes, lambda: done_bytes):
            read_all(targets, count)
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
