"""A random Mistral of three small layers, in the real architecture."""

from __future__ import annotations

import torch
from transformers import MistralConfig, MistralForCausalLM

VOCAB_SIZE = 300


def tiny_mistral(**changes: object) -> MistralForCausalLM:
    """Return the same random Mistral on every call, except for `changes` to its config."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # Ten times the default: sharper logits, so that answers differ from each other and do not repeat themselves.
        "initializer_range": 0.2,
    }
    model = MistralForCausalLM(MistralConfig(**(settings | changes))).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:  # initialised with ones: a forward that skips them would give the same logits
            weight.uniform_(0.5, 1.5)
    return model
