"""Fused linear layers: joins projections that read the same input into one matmul.

It defines the layout of a loaded model's weights, which batched steps and `generate` share. It leaves out packing for a
CPU (`cpu.packed_linear`) and the forward of a batched step (`decoder`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, MistralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP, apply_rotary_pos_emb


class FusedAttention(MistralAttention):
    """Mistral's attention with one projection for queries, keys and values, for `generate`."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q_size = self.config.num_attention_heads * self.head_dim
        kv_size = self.config.num_key_value_heads * self.head_dim
        q, k, v = self.qkv(hidden_states).split([q_size, kv_size, kv_size], dim=-1)
        q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))
        cos, sin = position_embeddings
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        out, weights = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=getattr(self.config, "sliding_window", None),
            **kwargs,
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class FusedMLP(MistralMLP):
    """Mistral's gated MLP with one projection for gate and up."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate).mul_(up))


class Linear(nn.Module):
    """A linear layer without bias. Its weight (outputs, inputs) is not a parameter.

    `fuse` makes the original parameters views of the weight, and `state_dict` names those parameters.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x (..., inputs); return (..., outputs)."""
        return F.linear(x, self.weight)

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply the rows of a step (rows, inputs), which are padded for the device; return (rows, outputs)."""
        return F.linear(rows, self.weight)


def fuse(model: MistralForCausalLM, device: torch.device | None = None) -> None:
    """Fuse the projections that read the same input, in place.

    The original parameters become views of the fused weight, so no weight is stored twice and `state_dict` still names
    the parameters. For a model on the meta device, `fuse` allocates uninitialised fused weights on `device`.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.qkv = _fused(device, attention.q_proj, attention.k_proj, attention.v_proj)
        mlp.gate_up = _fused(device, mlp.gate_proj, mlp.up_proj)
        attention.__class__, mlp.__class__ = FusedAttention, FusedMLP


def _fused(device: torch.device | None, *projections: nn.Linear) -> Linear:
    fused = torch.cat([p.weight.detach() for p in projections])
    if fused.is_meta:
        fused = torch.empty_like(fused, device=device)
    for projection, weight in zip(projections, fused.split([p.weight.shape[0] for p in projections]), strict=True):
        projection.weight = nn.Parameter(weight, requires_grad=False)
    return Linear(fused)
