"""The device: a GPU, or the CPU with stand-ins for streams, graphs, events and the attention kernel."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.checkpoint import random_mistral
from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache import contiguous
from model_server.compute.kv_cache.budget import KVCacheBudget
from model_server.compute.kv_cache.flash_check import verify_flash_attention
from model_server.compute.runner import Runner
from model_server.loading import loader
from tests.support.cuda import FakeCuda
from tests.support.flash_attention import documented_varlen_attn

A10G_BYTES, CONTEXT_BYTES = 22_731 * 2**20, 450 * 2**20
NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


@pytest.fixture(params=[pytest.param("cuda", marks=[pytest.mark.gpu, NO_CARD]), "stand-ins"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if request.param == "cuda":
        yield torch.device("cuda")
        gc.collect()
        torch.cuda.empty_cache()
        return
    FakeCuda(monkeypatch)
    monkeypatch.setattr(contiguous, "varlen_attn", documented_varlen_attn)
    yield torch.device("cpu")


@pytest.fixture
def figure() -> Callable[[str, Any], None]:
    """Print a measured value as a line of JSON; `make gpu` writes it into its results."""
    return lambda name, value: print("\n" + json.dumps({"benchmark": "tests", "test": name, "value": value}))


@pytest.fixture
def memory(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """All of the GPU's memory, or only as much as an A10G has besides a CUDA context, with an A10G's prompt chunks."""
    name: str = request.param
    if name == "the card's memory" or device.type == "cpu":
        yield name
        return
    torch.cuda.reset_peak_memory_stats()
    num_bytes, total_bytes = A10G_BYTES - CONTEXT_BYTES, torch.cuda.mem_get_info()[1]
    if total_bytes < A10G_BYTES:
        pytest.skip("this card has less memory than an A10G")
    torch.cuda.set_per_process_memory_fraction(num_bytes / total_bytes)
    monkeypatch.setattr(loader, "free_bytes", lambda device: num_bytes - torch.cuda.memory_reserved(device))
    monkeypatch.setattr(loader, "max_prefill_tokens", lambda device: 512)
    yield name
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def load_runner(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, int], tuple[Runner, KVCacheBudget]]:
    """Set up a model of random weights as the server does: Mistral 7B's shape on a GPU, a tiny shape with stand-ins."""
    if device.type == "cpu":
        monkeypatch.setattr(loader, "flash_attention_unavailable_reason", verify_flash_attention)
        monkeypatch.setattr(loader, "free_bytes", lambda device: 2**30)

    def load(max_model_len: int, max_batch_size: int) -> tuple[Runner, KVCacheBudget]:
        on_card = device.type == "cuda"
        with torch.no_grad():
            model = random_mistral(
                "7b" if on_card else "tiny", torch.float16 if on_card else torch.float32, str(device)
            )
            fuse(model.requires_grad_(False))
        loaded: Any = SimpleNamespace(model=model, device=device, dtype=model.dtype, max_model_len=max_model_len)
        runner, budget = loader._make_runner(loaded, max_batch_size, loader.max_prefill_tokens(device))
        runner.is_async = True
        return runner, budget

    return load
