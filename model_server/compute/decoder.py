"""Mistral's forward for a step of the shared lane: ragged, and in as few operations as PyTorch has for it.

The same mathematics as `transformers.models.mistral.modeling_mistral`, with three differences: all tokens of a step
lie in one row, the step's KV memory decides what each of them sees, and the last layer computes only the tokens whose
logits are wanted. A CPU rounds where the modules round, which costs it little. On a GPU each kernel of a decode step
counts, and attention rounds otherwise anyway: it takes operations that round once where the modules round twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MistralForCausalLM

from model_server.compute.fused_linear import Projection


class Step(Protocol):
    """A step in tensors: its tokens, and the memory that it reads and writes."""

    token_ids: Tensor
    """(tokens,)"""
    positions: Tensor
    """(tokens,), counted from the beginning of each token's row."""

    def attend(self, layer: int, q: Tensor, kv: Tensor, scaling: float) -> Tensor:
        """Write the tokens' keys and values and return attention's output.

        Shapes: q (tokens, heads, head_dim), kv (tokens, 2, kv_heads, head_dim); the output is
        (tokens, heads * head_dim).
        """


Multiply = Callable[[Tensor], Tensor]
MultiplyAndAdd = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's weights and multiplications. At hand: a module is asked for each by name, at every step."""

    input_norm: Tensor
    qkv: Multiply
    add_o_proj: MultiplyAndAdd
    norm: Tensor
    """The one after attention."""
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
            norm=layer.post_attention_layernorm.weight,
            gate_up=_multiply(mlp.gate_up),
            act_fn=mlp.act_fn,
            add_down_proj=_multiply_and_add(mlp.down_proj, fused_ops),
            scaling=attention.scaling,
        )


def _multiply(projection: Any) -> Multiply:
    """Return what multiplies the rows of a step: a step's number of rows is padded already."""
    return projection.multiply if isinstance(projection, Projection) else projection


def _multiply_and_add(projection: Any, in_one: bool) -> MultiplyAndAdd:
    """Return what multiplies rows and adds them to others, in place of one of the two."""
    if in_one:
        weight = projection.weight.t()
        return lambda rows, others: others.addmm_(rows, weight)
    multiply = _multiply(projection)
    return lambda rows, others: multiply(rows).add_(others)


class Decoder:
    """The layers of a fused model; called with a step, returns logits."""

    def __init__(self, model: MistralForCausalLM, *, fused_ops: bool | None = None) -> None:
        """Take a model whose projections are fused; `fused_ops` is for a GPU, and the default there."""
        config = model.config
        self._few_kernels = model.device.type != "cpu" if fused_ops is None else fused_ops
        self._embedding = model.model.embed_tokens.weight
        self._rotary = model.model.rotary_emb
        self._layers = [Layer.of(layer, fused_ops=self._few_kernels) for layer in model.model.layers]
        self._last_norm = model.model.norm.weight
        self._lm_head = _multiply(model.lm_head)
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._eps = config.rms_norm_eps

    @torch.inference_mode()
    def __call__(self, step: Step, wanted: Tensor) -> Tensor:
        """Run a step and return the logits after the wanted tokens, (wanted, vocab_size), in the model's dtype."""
        hidden = F.embedding(step.token_ids, self._embedding)
        cos, sin = self._rotary(hidden, step.positions[None])
        # (tokens, 1, head_dim); with the first half of the sines negated, rotating is one roll and two products.
        cos, sin = cos[0, :, None], sin[0, :, None].clone()
        sin[..., : sin.shape[-1] // 2].neg_()
        for index, layer in enumerate(self._layers):
            out = self._attend(step, index, layer, hidden, cos, sin)
            if index == len(self._layers) - 1:
                hidden, out = hidden[wanted], out[wanted]
            hidden = layer.add_o_proj(out, hidden)
            gate, up = layer.gate_up(self._norm(hidden, layer.norm)).chunk(2, dim=-1)
            hidden = layer.add_down_proj(layer.act_fn(gate).mul_(up), hidden)
        return self._lm_head(self._norm(hidden, self._last_norm))

    def _attend(self, step: Step, index: int, layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size, num_heads, kv_heads = cos.shape[-1], self._num_heads, self._num_kv_heads
        qkv = layer.qkv(self._norm(hidden, layer.input_norm)).view(-1, num_heads + 2 * kv_heads, size)
        rotated = qkv.narrow(1, 0, num_heads + kv_heads)
        if self._few_kernels:  # a GPU rolls only what lies in one piece, and would copy it first
            rolled = rotated.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
            rotated.mul_(cos).addcmul_(rolled, sin)
        else:
            rolled = rotated.roll(size // 2, -1).mul_(sin)
            rotated.mul_(cos).add_(rolled)
        q, kv = qkv.split_with_sizes((num_heads, 2 * kv_heads), 1)
        return step.attend(index, q, kv.view(-1, 2, kv_heads, size), layer.scaling)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if self._few_kernels:
            return torch.rms_norm(hidden, weight.shape, weight, self._eps)
        return torch.rms_norm(hidden.float(), weight.shape, None, self._eps).to(hidden.dtype).mul_(weight)
