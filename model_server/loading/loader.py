"""Makes a model from the settings: weights, number of sequences, KV cache, CUDA graphs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from model_server.compute.cpu.packed_linear import pack
from model_server.compute.cpu.threads import run_in_short_lived_thread
from model_server.compute.gpu.worst_step import reserved_bytes
from model_server.compute.kv_cache import budget
from model_server.compute.kv_cache.budget import KVCacheBudget
from model_server.compute.kv_cache.flash_check import flash_attention_unavailable_reason
from model_server.compute.runner import Runner, make_kv_cache
from model_server.errors import StartupError
from model_server.loading import source, weights
from model_server.loading.device import free_bytes
from model_server.settings import Settings
from model_server.telemetry import startup
from model_server.telemetry.progress import in_units
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
    max_prefill_tokens: int
    """Prompt tokens that a step prefills."""
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
    prefill_tokens = settings.max_prefill_tokens or max_prefill_tokens(loaded.device)
    runner, kv_cache = _make_runner(loaded, settings.max_batch_size, prefill_tokens)
    return ServableModel(
        runner=runner,
        text=loaded.text,
        device=loaded.device,
        max_model_len=loaded.max_model_len,
        max_prefill_tokens=prefill_tokens,
        kv_cache=kv_cache,
        load_seconds=loaded.load_seconds,
    )


def _read(settings: Settings) -> weights.LoadedModel:
    loaded = weights.load(source.resolve(settings), settings)
    pack(loaded.model)
    return loaded


def max_prefill_tokens(device: torch.device) -> int:
    """Return the prompt tokens that a step prefills: they keep the matmuls busy and do not stall the streams.

    512 tokens of a 7B model take an A10G about 0.14 s and an H100 about 0.01 s, by arithmetic.
    """
    if device.type != "cuda":
        return 128
    return 2048 if torch.cuda.get_device_capability(device) >= (9, 0) else 512


def _make_runner(loaded: weights.LoadedModel, max_batch_size: int, prefill_tokens: int) -> tuple[Runner, KVCacheBudget]:
    """Give the model as large a KV cache as fits, in the layout that its device computes best."""
    config, on_gpu = loaded.model.config, loaded.device.type == "cuda"
    if on_gpu:  # partial sums of float16 matmuls stay in float32
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    unavailable = flash_attention_unavailable_reason(config, loaded.dtype, loaded.device)
    try:
        reserved = reserved_bytes(
            loaded.model,
            flash=unavailable is None,
            max_batch_size=max_batch_size,
            max_prefill_tokens=prefill_tokens,
        )
    except torch.OutOfMemoryError:
        raise StartupError(
            f"A step of {max_batch_size} sequences does not fit into the GPU's memory beside the weights: "
            "choose a smaller --max_batch_size or a larger GPU."
        ) from None
    if on_gpu:
        torch.cuda.empty_cache()
        log.info("steps and CUDA graphs: %s reserved", in_units(reserved))
    kv_cache = budget.plan(
        config,
        loaded.dtype,
        loaded.device,
        free_bytes=max(0, free_bytes(loaded.device) - reserved),
        max_model_len=loaded.max_model_len,
        max_batch_size=max_batch_size,
        dense=unavailable is not None,
    )
    log.info("%s", kv_cache.reason)
    if unavailable is None:
        log.info("KV cache: contiguous, each request reserves the tokens it may need; flash attention")
    else:
        log.log(
            logging.WARNING if on_gpu else logging.INFO,
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
    if on_gpu and unavailable is not None:
        runner.missing_features += ["flash_attention", "cuda_graphs"]
    runner.capture_graphs(kv_cache.max_batch_size)
    if on_gpu:
        torch.cuda.synchronize()  # the engine computes on streams of its own, which do not wait for this one
    return runner, kv_cache
