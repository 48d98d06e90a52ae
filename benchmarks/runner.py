"""This server's runner with a model of random weights: its steps without the server."""

from __future__ import annotations

import gc
from typing import Any, TypeVar

import torch

from benchmarks.checkpoint import random_mistral
from model_server.compute.cpu.packed_linear import pack
from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.base import kv_bytes_per_token
from model_server.compute.kv_cache.flash_check import flash_attention_unavailable_reason
from model_server.compute.runner import Runner, make_kv_cache
from model_server.loading.device import free_bytes

R = TypeVar("R", bound=Runner)


def random_runner(kind: type[R], shape: str, dtype: str, device: str, *, max_batch_size: int, max_len: int) -> R:
    """Set up the process, a model and its KV cache as the server does; the KV cache leaves 15 % of the memory free."""
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    model: Any = random_mistral(shape, getattr(torch, dtype), device)
    fuse(model)
    pack(model)
    gc.freeze()
    torch.cuda.empty_cache()  # the memory that the allocator keeps does not count as free
    free_tokens = int(0.85 * free_bytes(model.device)) // kv_bytes_per_token(model.config, model.dtype)
    flash = flash_attention_unavailable_reason(model.config, model.dtype, model.device) is None
    cache = make_kv_cache(
        model.config, model.dtype, model.device, max_batch_size=max_batch_size,
        num_tokens=min(max_batch_size * max_len, free_tokens), max_sequence_tokens=max_len, flash=flash,
    )  # fmt: skip
    runner = kind(model, cache)
    runner.capture_graphs(max_batch_size)
    return runner
