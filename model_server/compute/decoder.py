"""Mistral's forward for a batched step, without padding between sequences.

It computes the same as `transformers.models.mistral.modeling_mistral`, with three differences. The tokens of all
sequences are concatenated, and the KV cache's step selects the keys of each token. The last layer computes only the
tokens whose logits are wanted. On a GPU, fused operations save kernels and round once where Transformers' modules
round twice; on a CPU, the rounding is the same as in those modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MistralForCausalLM

from model_server.compute.fused_linear import Linear


class Step(Protocol):
    """A step as tensors: its tokens and the keys and values that it reads and writes."""

    token_ids: Tensor
    """(tokens,)"""
    positions: Tensor
    """(tokens,): the position of each token in its sequence."""

    def attend(self, layer: int, q: Tensor, kv: Tensor, scaling: float) -> Tensor:
        """Write the keys and values of the tokens and return the attention output.

        Shapes: q (tokens, heads, head_dim), kv (tokens, 2, kv_heads, head_dim); the output is
        (tokens, heads * head_dim).
        """


Multiply = Callable[[Tensor], Tensor]
MultiplyAndAdd = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's weights and matmuls as plain attributes, which avoids `nn.Module`'s lookup by name at every access."""

    input_norm: Tensor
    qkv: Multiply
    add_o_proj: MultiplyAndAdd
    post_attention_norm: Tensor
    gate_up: Multiply
    act_fn: Callable[[Tensor], Tensor]
    add_down_proj: MultiplyAndAdd
    scaling: float

    @classmethod
    def of(cls, layer: Any, *, fused_ops: bool) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            input_norm=layer.input_layernorm.weight,
            qkv=_multiply(attention.qkv),
            add_o_proj=_multiply_and_add(attention.o_proj, fused_ops),
            post_attention_norm=layer.post_attention_layernorm.weight,
            gate_up=_multiply(mlp.gate_up),
            act_fn=mlp.act_fn,
            add_down_proj=_multiply_and_add(mlp.down_proj, fused_ops),
            scaling=attention.scaling,
        )


def _multiply(linear: Any) -> Multiply:
    """Return the matmul for the tokens of a step, which the step has padded."""
    return linear.multiply if isinstance(linear, Linear) else linear


def _multiply_and_add(linear: Any, fused_ops: bool) -> MultiplyAndAdd:
    """Return a matmul that adds its product to a residual; it writes the sum in place of the product or residual."""
    if fused_ops:
        weight = linear.weight.t()
        return lambda rows, residual: residual.addmm_(rows, weight)
    multiply = _multiply(linear)
    return lambda rows, residual: multiply(rows).add_(residual)


class Decoder:
    """Computes the logits of a step with the layers of a fused model."""

    def __init__(self, model: MistralForCausalLM, *, fused_ops: bool | None = None) -> None:
        """Take a fused model; `fused_ops` selects fused operations (default: on every device except a CPU)."""
        config = model.config
        self.fused_ops = model.device.type != "cpu" if fused_ops is None else fused_ops
        self._embedding = model.model.embed_tokens.weight
        self._rotary = model.model.rotary_emb
        self._layers = [Layer.of(layer, fused_ops=self.fused_ops) for layer in model.model.layers]
        self._last_norm = model.model.norm.weight
        self._lm_head = _multiply(model.lm_head)
        self._vocab_size = config.vocab_size
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._eps = config.rms_norm_eps

    @torch.inference_mode()
    def __call__(self, step: Step, wanted: Tensor) -> Tensor:
        """Run a step and return the logits after the wanted tokens: (wanted, vocab_size), in the model's dtype."""
        hidden = F.embedding(step.token_ids, self._embedding)
        cos, sin = self._rotary(hidden, step.positions[None])
        # (tokens, 1, head_dim). With the first half of the sines negated, a rotation is one roll and two products.
        cos, sin = cos[0, :, None], sin[0, :, None].clone()
        sin[..., : sin.shape[-1] // 2].neg_()
        for index, layer in enumerate(self._layers):
            out = self._attend(step, index, layer, hidden, cos, sin)
            if index == len(self._layers) - 1:
                if not len(wanted):  # the chunk does not complete its prompt: only its keys and values are needed
                    return hidden.new_empty((0, self._vocab_size))
                hidden, out = hidden[wanted], out[wanted]
            hidden = layer.add_o_proj(out, hidden)
            gate, up = layer.gate_up(self._norm(hidden, layer.post_attention_norm)).chunk(2, dim=-1)
            hidden = layer.add_down_proj(layer.act_fn(gate).mul_(up), hidden)
        return self._lm_head(self._norm(hidden, self._last_norm))

    def _attend(self, step: Step, index: int, layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size, num_heads, kv_heads = cos.shape[-1], self._num_heads, self._num_kv_heads
        qkv = layer.qkv(self._norm(hidden, layer.input_norm)).view(-1, num_heads + 2 * kv_heads, size)
        rotated = qkv.narrow(1, 0, num_heads + kv_heads)
        if self.fused_ops:  # on a GPU, `roll` would copy its input, which is not contiguous
            rolled = rotated.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
            rotated.mul_(cos).addcmul_(rolled, sin)
        else:
            rolled = rotated.roll(size // 2, -1).mul_(sin)
            rotated.mul_(cos).add_(rolled)
        q, kv = qkv.split_with_sizes((num_heads, 2 * kv_heads), 1)
        return step.attend(index, q, kv.view(-1, 2, kv_heads, size), layer.scaling)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if self.fused_ops:
            return torch.rms_norm(hidden, weight.shape, weight, self._eps)
        return torch.rms_norm(hidden.float(), weight.shape, None, self._eps).to(hidden.dtype).mul_(weight)
