"""The forward in a GPU's few kernels is the forward: the same logits, to a rounding."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import MistralForCausalLM

from model_server.compute.decoder import Decoder
from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.runner import Runner
from tests.engine.test_oracle import prompt
from tests.support.tiny_model import tiny_mistral

TOKENS = [*prompt(40), 7, 8]


def in_few_kernels(model: MistralForCausalLM) -> Tensor:
    """Fuse the model; return the logits after each token from the 25th on, read in two chunks and then decoded."""
    fuse(model)
    spans = ContiguousKVCache(
        model.config, num_tokens=90, max_sequence_tokens=90, dtype=model.dtype, device=model.device, flash=False
    )
    runner = Runner(model, spans)
    runner._decoder = Decoder(model, fused_ops=True)
    beside = TokenRange(50, 0, TOKENS[:3])
    read = runner.forward([], [TokenRange(3, 0, TOKENS[:25]), beside], [24])
    rest = runner.forward([], [TokenRange(3, 25, TOKENS[25:40])], range(15))
    decoded = [
        runner.forward([TokenRange(3, 40, TOKENS[40:41]), TokenRange(50, 3, TOKENS[3:4])], [], [0]),
        runner.forward([TokenRange(3, 41, TOKENS[41:])], [], [0]),
    ]
    return torch.cat([read, rest, *decoded])


def test_few_kernels_give_the_models_logits() -> None:
    model = tiny_mistral()
    wanted = model(torch.tensor([TOKENS])).logits[0, 24:]

    torch.testing.assert_close(in_few_kernels(model), wanted, rtol=0, atol=1e-4)


def test_few_kernels_round_no_worse_than_the_model() -> None:
    exact = tiny_mistral()(torch.tensor([TOKENS])).logits[0, 24:]
    model = tiny_mistral().bfloat16()
    rounded = model(torch.tensor([TOKENS])).logits[0, 24:].float()

    ours = (in_few_kernels(model) - exact).abs().mean()

    assert ours < 1.1 * (rounded - exact).abs().mean()


def test_few_kernels_are_for_what_is_no_cpu() -> None:
    model = tiny_mistral()
    fuse(model)

    assert not Decoder(model)._few_kernels
    assert Decoder(model.to("meta"))._few_kernels
