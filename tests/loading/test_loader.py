"""The loader: what a model gets on its device, and that a slower substitute on a GPU is a warning."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model_server.compute.fused_linear import fuse
from model_server.errors import StartupError
from model_server.loading import loader
from model_server.settings import Settings
from tests.support.tiny_model import tiny_mistral


def loaded(device: str) -> Any:
    model = tiny_mistral()
    fuse(model)
    return SimpleNamespace(model=model, device=torch.device(device), dtype=torch.float32, max_model_len=64)


@pytest.fixture
def gpu_without_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's view of a GPU whose flash attention is refused; the KV cache itself is made on the CPU."""
    make, cpu = loader.make_kv_cache, torch.device("cpu")
    monkeypatch.setattr(loader, "flash_attention_unavailable_reason", lambda *args: "no kernel for this card")
    monkeypatch.setattr(loader, "reserved_bytes", lambda model, **sizes: 0)
    monkeypatch.setattr(loader, "free_bytes", lambda device: 10**7)
    monkeypatch.setattr(
        loader, "make_kv_cache", lambda config, dtype, device, **sizes: make(config, dtype, cpu, **sizes)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    for name in ("empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)


@pytest.mark.usefixtures("gpu_without_flash_attention")
def test_gpu_without_flash_attention_is_a_warning_and_degraded(caplog: pytest.LogCaptureFixture) -> None:
    """It serves at a fifth of the speed, which nobody would notice for weeks."""
    runner, _ = loader._make_runner(loaded("cuda"), 4, 64)

    assert runner.missing_features == ["flash_attention", "cuda_graphs"]
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "no flash attention: no kernel for this card" in warning.getMessage()


@pytest.mark.usefixtures("gpu_without_flash_attention")
def test_float16_matmuls_on_a_gpu_sum_in_float32() -> None:
    loader._make_runner(loaded("cuda"), 4, 64)

    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


def test_cpu_is_not_degraded_without_flash_attention(caplog: pytest.LogCaptureFixture) -> None:
    runner, _ = loader._make_runner(loaded("cpu"), 4, 64)

    assert runner.missing_features == []
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_memory_that_steps_need_is_not_given_to_the_kv_cache(
    gpu_without_flash_attention: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, all_memory = loader._make_runner(loaded("cuda"), 1000, 64)
    monkeypatch.setattr(loader, "reserved_bytes", lambda model, **sizes: 5 * 10**6)

    _, half = loader._make_runner(loaded("cuda"), 1000, 64)

    assert half.num_tokens == pytest.approx(all_memory.num_tokens / 2, rel=0.05)


def test_step_that_does_not_fit_stops_the_start_with_a_sentence(
    gpu_without_flash_attention: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(model: Any, **sizes: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loader, "reserved_bytes", out_of_memory)

    with pytest.raises(StartupError, match="choose a smaller --max_batch_size"):
        loader._make_runner(loaded("cuda"), 1000, 64)


def test_steps_that_need_all_memory_stop_the_start_with_a_sentence(
    gpu_without_flash_attention: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "reserved_bytes", lambda model, **sizes: 10**12)

    with pytest.raises(StartupError, match="0 bytes can be used"):
        loader._make_runner(loaded("cuda"), 1000, 64)


@pytest.mark.parametrize(("capability", "tokens"), [((8, 6), 512), ((9, 0), 2048)])
def test_faster_card_prefills_more_tokens_a_step(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], tokens: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    assert loader.max_prefill_tokens(torch.device("cuda")) == tokens
    assert loader.max_prefill_tokens(torch.device("cpu")) == 128


@pytest.mark.parametrize(("eos", "ids"), [(2, (2,)), ([2, 3], (2, 3)), (None, ())])
def test_end_of_sequence_tokens_are_a_tuple(model_dir: Path, eos: Any, ids: tuple[int, ...]) -> None:
    servable = loader.load(Settings(model_dir=model_dir, dtype="float32", max_model_len=64, max_batch_size=2))
    servable.runner.model.generation_config.eos_token_id = eos

    assert servable.eos_token_ids == ids


@pytest.mark.parametrize(("setting", "tokens"), [(0, 128), (40, 40)])
def test_prompt_tokens_of_a_step_are_as_configured_or_chosen_by_device(
    model_dir: Path, setting: int, tokens: int
) -> None:
    servable = loader.load(
        Settings(model_dir=model_dir, dtype="float32", max_model_len=64, max_batch_size=2, max_prefill_tokens=setting)
    )

    assert servable.max_prefill_tokens == tokens
