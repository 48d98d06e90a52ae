"""Settings to a model that can compute: weights, number of sequences, KV cache, CUDA graphs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from model_server.compute.cpu.packed_linear import pack
from model_server.compute.cpu.threads import run_in_short_lived_thread
from model_server.compute.kv_cache import budget
from model_server.compute.kv_cache.budget import KVCacheBudget
from model_server.compute.kv_cache.flash_check import flash_attention_unavailable_reason
from model_server.compute.runner import Runner, make_kv_cache
from model_server.loading import source, weights
from model_server.loading.device import free_bytes
from model_server.settings import Settings
from model_server.telemetry import startup
from model_server.text.tokenizer import Text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServableModel:
    """A model with its KV cache, ready for the engine."""

    runner: Runner
    text: Text
    device: torch.device
    max_model_len: int
    """Prompt and answer together, in tokens."""
    kv_cache: KVCacheBudget
    load_seconds: float

    @property
    def vocab_size(self) -> int:
        size: int = self.runner.model.config.vocab_size
        return size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer by default."""
        ids = self.runner.model.generation_config.eos_token_id
        return (ids,) if isinstance(ids, int) else tuple(ids or ())


def load(settings: Settings) -> ServableModel:
    """Read the model and give it a KV cache in the memory that is left.

    Raises:
        StartupError: the model cannot be served; the sentence says what to do.
    """
    loaded = run_in_short_lived_thread(lambda: _read(settings))
    startup.phase_ended("weights")
    for reason in loaded.reasons:
        log.info("%s", reason)
    runner, kv_cache = _make_runner(loaded, settings.max_batch_size)
    return ServableModel(runner, loaded.text, loaded.device, loaded.max_model_len, kv_cache, loaded.load_seconds)


def _read(settings: Settings) -> weights.LoadedModel:
    loaded = weights.load(source.resolve(settings), settings)
    pack(loaded.model)
    return loaded


def _make_runner(loaded: weights.LoadedModel, max_batch_size: int) -> tuple[Runner, KVCacheBudget]:
    """Give the model as large a KV cache as fits, in the layout that its device computes best."""
    config = loaded.model.config
    unavailable = flash_attention_unavailable_reason(config, loaded.dtype, loaded.device)
    kv_cache = budget.plan(
        config,
        loaded.dtype,
        loaded.device,
        free_bytes=free_bytes(loaded.device),
        max_model_len=loaded.max_model_len,
        max_batch_size=max_batch_size,
        dense=unavailable is not None,
    )
    log.info("%s", kv_cache.reason)
    if unavailable is None:
        log.info("KV cache: contiguous, each request reserves the tokens it may need; flash attention")
    else:
        log.info(
            "KV cache: dense, each request reserves %d tokens; no flash attention: %s",
            loaded.max_model_len,
            unavailable,
        )
    cache = make_kv_cache(
        config,
        loaded.dtype,
        loaded.device,
        max_batch_size=kv_cache.max_batch_size,
        num_tokens=kv_cache.num_tokens,
        max_sequence_tokens=loaded.max_model_len,
        flash=unavailable is None,
    )
    runner = Runner(loaded.model, cache)
    runner.capture_graphs(kv_cache.max_batch_size)
    return runner, kv_cache
