"""The decoder with a GPU's fused operations returns the model's logits, except for rounding."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import MistralForCausalLM

from model_server.compute.decoder import Decoder
from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.runner import Runner
from tests.support.oracle import prompt
from tests.support.tiny_model import tiny_mistral

TOKENS = [*prompt(40), 7, 8]


def fused_ops_logits(model: MistralForCausalLM) -> Tensor:
    """Fuse the model; return the logits after each token from the 25th on: two prompt chunks, then decode steps."""
    fuse(model)
    cache = ContiguousKVCache(
        model.config, num_tokens=90, max_sequence_tokens=90, dtype=model.dtype, device=model.device, flash=False
    )
    runner = Runner(model, cache)
    runner.decoder = Decoder(model, fused_ops=True)
    beside = TokenRange(50, 0, TOKENS[:3])
    read = runner.forward([], [TokenRange(3, 0, TOKENS[:25]), beside], [24])
    rest = runner.forward([], [TokenRange(3, 25, TOKENS[25:40])], range(15))
    decoded = [
        runner.forward([TokenRange(3, 40, TOKENS[40:41]), TokenRange(50, 3, TOKENS[3:4])], [], [0]),
        runner.forward([TokenRange(3, 41, TOKENS[41:])], [], [0]),
    ]
    return torch.cat([read, rest, *decoded])


def test_fused_operations_give_the_models_logits() -> None:
    model = tiny_mistral()
    wanted = model(torch.tensor([TOKENS])).logits[0, 24:]

    torch.testing.assert_close(fused_ops_logits(model), wanted, rtol=0, atol=1e-4)


def test_fused_operations_round_no_worse_than_the_model() -> None:
    exact = tiny_mistral()(torch.tensor([TOKENS])).logits[0, 24:]
    model = tiny_mistral().bfloat16()
    rounded = model(torch.tensor([TOKENS])).logits[0, 24:].float()

    ours = (fused_ops_logits(model) - exact).abs().mean()

    assert ours < 1.1 * (rounded - exact).abs().mean()


def test_fused_operations_are_used_on_every_device_but_a_cpu() -> None:
    model = tiny_mistral()
    fuse(model)

    assert not Decoder(model).fused_ops
    assert Decoder(model.to("meta")).fused_ops


def test_chunk_inside_a_prompt_computes_no_logits_but_its_keys_and_values() -> None:
    model = tiny_mistral()
    expected = model(torch.tensor([TOKENS])).logits[0, -1:]
    fuse(model)
    cache = ContiguousKVCache(
        model.config, num_tokens=90, max_sequence_tokens=90, dtype=model.dtype, device=model.device, flash=False
    )
    runner = Runner(model, cache)

    assert runner.forward([], [TokenRange(3, 0, TOKENS[:25])], []).shape == (0, model.config.vocab_size)
    logits = runner.forward([], [TokenRange(3, 25, TOKENS[25:])], [len(TOKENS) - 26])

    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
