"""Mistral's forward for a step of the shared lane: ragged, and in as few operations as PyTorch has for it.

The same mathematics as `transformers.models.mistral.modeling_mistral`, rounded at the same places where that costs
little, with three differences: all tokens of a step lie in one row, the step's KV memory decides what each of them
sees, and the last layer computes only the tokens whose logits are wanted.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MistralForCausalLM


class Step(Protocol):
    """A step in tensors: its tokens, and the memory that it reads and writes."""

    token_ids: Tensor
    """(tokens,)"""
    positions: Tensor
    """(tokens,), counted from the beginning of each token's row."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Write the tokens' keys and values and return attention's output.

        Shapes: q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim); the output is
        (tokens, heads * head_dim).
        """


class Decoder:
    """The layers of a fused model; called with a step, returns logits."""

    def __init__(self, model: MistralForCausalLM) -> None:
        config = model.config
        self._model = model.model
        self._lm_head = model.lm_head
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._eps = config.rms_norm_eps

    @torch.inference_mode()
    def __call__(self, step: Step, wanted: Tensor) -> Tensor:
        """Run a step and return the logits after the wanted tokens, (wanted, vocab_size), in the model's dtype."""
        layers = self._model.layers
        hidden = F.embedding(step.token_ids, self._model.embed_tokens.weight)
        cos, sin = self._model.rotary_emb(hidden, step.positions[None])
        # (tokens, 1, head_dim); with the first half of the sines negated, rotating is one roll and two products.
        cos, sin = cos[0, :, None], sin[0, :, None].clone()
        sin[..., : sin.shape[-1] // 2].neg_()
        for index, layer in enumerate(layers):
            out = self._attend(step, index, layer, hidden, cos, sin)
            if index == len(layers) - 1:
                hidden, out = hidden[wanted], out[wanted]
            hidden = layer.self_attn.o_proj(out).add_(hidden)
            hidden = layer.mlp(self._norm(hidden, layer.post_attention_layernorm)).add_(hidden)
        logits: Tensor = self._lm_head(self._norm(hidden, self._model.norm))
        return logits

    def _attend(self, step: Step, index: int, layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attention = layer.self_attn
        qkv = attention.qkv(self._norm(hidden, layer.input_layernorm))
        heads = qkv.view(len(qkv), -1, cos.shape[-1])
        unrotated, v = heads.split([self._num_heads + self._num_kv_heads, self._num_kv_heads], dim=1)
        rotated = (unrotated * cos).add_(unrotated.roll(cos.shape[-1] // 2, -1).mul_(sin))
        q, k = rotated.split([self._num_heads, self._num_kv_heads], dim=1)
        return step.attend(index, q, k, v, attention.scaling)

    def _norm(self, hidden: Tensor, norm: Any) -> Tensor:
        if hidden.is_cuda:  # one kernel instead of seven; it rounds once where the module rounds twice
            return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, self._eps)
        normed: Tensor = norm(hidden)
        return normed
