"""The KV cache's memory budget: the sequences and tokens that fit besides the weights."""

from __future__ import annotations

import pytest
import torch

from model_server.compute.kv_cache.base import kv_bytes_per_token
from model_server.compute.kv_cache.budget import plan
from model_server.errors import StartupError
from tests.support.tiny_model import tiny_mistral


@pytest.mark.parametrize(("dense", "batch_size", "tokens"), [(True, 11, 11 * 4096), (False, 32, 48_000)])
def test_contiguous_cache_holds_more_sequences_than_a_dense_one(dense: bool, batch_size: int, tokens: int) -> None:
    """Mistral 7B in float16 on a GPU with 24 GB; each token has 64 KB of keys and 64 KB of values."""
    config = tiny_mistral().config
    config.update({"num_hidden_layers": 32, "num_key_value_heads": 8, "num_attention_heads": 32, "head_dim": 128})
    assert kv_bytes_per_token(config, torch.float16) == 128 * 1024
    free_bytes = int(48_000 * 128 * 1024 / 0.75 / 0.9) + 2

    budget = plan(
        config,
        torch.float16,
        torch.device("cuda"),
        free_bytes=free_bytes,
        max_model_len=4096,
        max_batch_size=32,
        dense=dense,
    )

    assert (budget.max_batch_size, budget.num_tokens) == (batch_size, tokens)


def test_memory_for_less_than_one_sequence_is_refused_at_start() -> None:
    with pytest.raises(StartupError, match="choose a smaller --max_model_len"):
        plan(
            tiny_mistral().config,
            torch.float32,
            torch.device("cpu"),
            free_bytes=1 << 20,
            max_model_len=4096,
            max_batch_size=1,
            dense=False,
        )
