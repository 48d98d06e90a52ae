"""The check of flash attention at startup: it accepts a correct kernel and refuses a wrong one with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model_server.compute.kv_cache import contiguous
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.kv_cache.flash_check import flash_attention_unavailable_reason, verify_flash_attention
from tests.support.flash_attention import documented_varlen_attn
from tests.support.tiny_model import tiny_mistral

CPU = torch.device("cpu")
CONFIG = tiny_mistral().config


def test_flash_attention_is_not_used_without_a_gpu() -> None:
    assert flash_attention_unavailable_reason(CONFIG, torch.float16, CPU) == "the device is a cpu"


@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_that_works_as_documented_is_trusted(
    monkeypatch: pytest.MonkeyPatch, window: int | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(contiguous, "varlen_attn", documented_varlen_attn)

    assert verify_flash_attention(tiny_mistral(sliding_window=window).config, dtype, CPU) is None


@pytest.mark.parametrize("argument", ["cu_seq_k", "seqused_k", "window_size"])
def test_kernel_that_ignores_an_argument_is_refused(monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    def careless(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *lengths: int, **rest: Any) -> Tensor:
        if argument == "cu_seq_k":
            cu_k = torch.zeros_like(cu_k)
        elif argument == "seqused_k":
            rest["seqused_k"] = torch.full_like(rest["seqused_k"], 100)
        else:
            rest["window_size"] = (-1, -1)
        return documented_varlen_attn(q, k, v, cu_q, cu_k, *lengths, **rest)

    monkeypatch.setattr(contiguous, "varlen_attn", careless)

    reason = verify_flash_attention(CONFIG, torch.float32, CPU)
    assert reason is not None
    assert "differs from plain attention's" in reason


@pytest.mark.parametrize("fault", ["shifted by a token", "keys and values swapped"])
def test_cache_written_in_the_wrong_slots_is_refused(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Both kernels read the same wrong slots, so comparing their outputs finds no error."""
    monkeypatch.setattr(contiguous, "varlen_attn", documented_varlen_attn)
    make = ContiguousKVCache.__init__

    def make_wrong(cache: ContiguousKVCache, *args: Any, **options: Any) -> None:
        make(cache, *args, **options)
        shifted = fault == "shifted by a token"
        cache.by_token = tuple(memory[1:] if shifted else memory.flip(1) for memory in cache.by_token)

    monkeypatch.setattr(ContiguousKVCache, "__init__", make_wrong)

    assert verify_flash_attention(CONFIG, torch.float32, CPU) == (
        "keys and values are not written where attention reads them"
    )


def raising(error: Exception) -> Any:
    def kernel(*args: Any, **rest: Any) -> Tensor:
        raise error

    return kernel


def test_kernel_that_raises_is_refused_with_the_first_line_of_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nException raised from ...")
    monkeypatch.setattr(contiguous, "varlen_attn", raising(error))

    assert verify_flash_attention(CONFIG, torch.float32, CPU) == "FlashAttention only supports Ampere GPUs or newer."


def test_broken_device_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal memory access, nothing runs on the device: a fallback would fail later with another message."""
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(contiguous, "varlen_attn", raising(error))

    with pytest.raises(torch.AcceleratorError):
        verify_flash_attention(CONFIG, torch.float32, CPU)
