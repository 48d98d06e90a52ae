"""The weights' layout, the same for both lanes: projections that read the same input lie side by side, packed on a CPU.

Owns what is done to a loaded model before anything computes. Leaves out the shared lane's forward (decoder).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MistralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP, apply_rotary_pos_emb

PACKABLE = (torch.float32, torch.bfloat16)
PACKED_FOR_ROWS = 8
"""How many rows the packed layout is made for; of 1, 8, 32 and 128 this one was never far from the best."""
MOST_ROWS, PIECES = 160, (512, 256, 128)
"""More rows than the one are multiplied in pieces of the others, as large as may be: of few sizes (`padded`)."""


class FusedAttention(MistralAttention):
    """Mistral's attention with one projection for queries, keys and values, for the own lane's `generate`."""

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
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

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate).mul_(up))


def fuse(model: MistralForCausalLM, device: torch.device | None = None) -> None:
    """Lay the projections that read the same input side by side, in place.

    The old parameters become views of the fused ones, so nothing is held twice and `state_dict` still names them. A
    model without memory (on the meta device) gets memory for them on `device`, to be filled.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.qkv = _side_by_side(device, attention.q_proj, attention.k_proj, attention.v_proj)
        mlp.gate_up = _side_by_side(device, mlp.gate_proj, mlp.up_proj)
        attention.__class__, mlp.__class__ = FusedAttention, FusedMLP


def _side_by_side(device: torch.device | None, *projections: nn.Linear) -> Projection:
    fused = torch.cat([p.weight.detach() for p in projections])
    if fused.is_meta:
        fused = torch.empty_like(fused, device=device)
    for projection, rows in zip(projections, fused.split([p.weight.shape[0] for p in projections]), strict=True):
        projection.weight = nn.Parameter(rows, requires_grad=False)
    return Projection(fused)


class Projection(nn.Module):
    """A matmul with a weight (outputs, inputs) that is laid out for the device it runs on; no bias."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.detach()
        """Not a parameter: the modules that were fused name its rows."""
        self.packed = False
        self._num_outputs, self._num_inputs = weight.shape

    def pack(self) -> None:
        """Lay the weight out in the blocks that oneDNN computes with, instead of again at every call."""
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_FOR_ROWS)
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self.packed = True

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., inputs)."""
        if not self.packed:
            return F.linear(x, self.weight)
        rows = x.flatten(0, -2)
        missing = padded(len(rows)) - len(rows)
        product = self.multiply(F.pad(rows, (0, 0, 0, missing)) if missing else rows)
        return product[: len(product) - missing].view(*x.shape[:-1], self._num_outputs)

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply (rows, inputs), whose number is as `padded` wants it: the shared lane's steps are made so.

        Apart from `forward` because a decode step on a CPU is short: what that asks and reshapes is 10 microseconds.
        """
        if not self.packed:
            return F.linear(rows, self.weight)
        if rows.shape[0] > MOST_ROWS and rows.shape[0] not in PIECES:
            return torch.cat([self.multiply(piece) for piece in rows.split(_pieces(rows.shape[0]))])
        product: Tensor = self._linear(rows, self.weight, None, "none", [], "")
        return product

    def compile(self, num_rows: int) -> None:
        """Have oneDNN compile for so many rows now, once packed, so that no step has to wait for it."""
        self.multiply(torch.zeros((num_rows, self._num_inputs), dtype=self.weight.dtype))


def padded(num_rows: int) -> int:
    """Return how many rows a CPU multiplies for so many.

    oneDNN compiles a matmul for each number of rows at first sight: milliseconds each, and half a megabyte that is
    kept. A few sizes cost less than every size once; and four rows take less time than one.
    """
    granule = 4 if num_rows <= 8 else 8 if num_rows <= 32 else 16
    return -(-num_rows // granule) * granule


def _pieces(num_rows: int) -> list[int]:
    sizes = []
    for size in PIECES:
        sizes += [size] * (num_rows // size)
        num_rows %= size
    return [*sizes, num_rows] if num_rows else sizes


PADDED_SIZES = sorted({padded(n) for n in range(1, MOST_ROWS + 1)} | set(PIECES))


def packable(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether oneDNN packs weights of this format here."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and dtype in PACKABLE


def pack(model: MistralForCausalLM) -> None:
    """Pack a fused model's projections, one after the other, each in place of what it was: a CPU only.

    The weights cannot be read back afterwards. Measured on two cores with AVX-512 BF16, all matmuls of a decode step:
    1.7 times as fast at 1 and 8 rows, 1.4 times at 32 (`docs/decisions.md`). What oneDNN does not pack stays as it is.
    """
    if not packable(model.dtype, model.device):
        return
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for module, names in ((attention, ("q_proj", "k_proj", "v_proj")), (mlp, ("gate_proj", "up_proj"))):
            for name in names:
                delattr(module, name)
        attention.o_proj, mlp.down_proj = Projection(attention.o_proj.weight), Projection(mlp.down_proj.weight)
        for projection in (attention.qkv, attention.o_proj, mlp.gate_up, mlp.down_proj):
            projection.pack()
    model.lm_head = Projection(model.lm_head.weight)
    model.lm_head.pack()
