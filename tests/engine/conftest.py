"""Models whose text repeats itself, for prompt lookup."""

from __future__ import annotations

import pytest
import torch
from transformers import MistralForCausalLM

from model_server.compute.cpu.packed_linear import pack
from model_server.compute.fused_linear import fuse
from tests.support.prompt_lookup import (
    VOCAB_SIZE,
    make_chain_model,
)
from tests.support.tiny_model import tiny_mistral


@pytest.fixture(scope="module")
def plain_repeating_model() -> MistralForCausalLM:
    """A random model with few tokens: its text repeats itself and its prompt, but only briefly."""
    return tiny_mistral(vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def repeating_model() -> MistralForCausalLM:
    """The same model, prepared as the server prepares it."""
    model = tiny_mistral(vocab_size=VOCAB_SIZE)
    fuse(model)
    pack(model)
    return model


@pytest.fixture(scope="module")
def chain_model() -> MistralForCausalLM:
    return make_chain_model(torch.float32)
