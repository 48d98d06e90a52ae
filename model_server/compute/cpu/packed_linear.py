"""Packed weights: a CPU multiplies with oneDNN's blocked layout, and with few numbers of rows.

oneDNN compiles a matmul for each number of rows that it meets: milliseconds each, and half a megabyte that it keeps. So
rows are padded to few sizes, and long inputs are multiplied in pieces of few sizes.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MistralForCausalLM

from model_server.compute.fused_linear import Linear

PACKED_FOR_ROWS = 8
"""The number of rows that the layout is made for; of 1, 8, 32 and 128 this one was never far from the best."""
MAX_ROWS, PIECES = 160, (512, 256, 128)
"""Inputs of more than MAX_ROWS rows are multiplied in pieces of these sizes, the largest first."""


class PackedLinear(Linear):
    """A linear layer whose weight is in oneDNN's blocks; the weight cannot be read back."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR_ROWS))
        self.num_outputs, self.num_inputs = weight.shape
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., inputs)."""
        rows = x.flatten(0, -2)
        missing = padded(len(rows)) - len(rows)
        product = self.multiply(F.pad(rows, (0, 0, 0, missing)) if missing else rows)
        return product[: len(product) - missing].view(*x.shape[:-1], self.num_outputs)

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply (rows, inputs), padded to a size that `padded` returns, as steps are.

        Apart from `forward` because a decode step on a CPU is short: the checks and reshapes there take 10 us.
        """
        if rows.shape[0] > MAX_ROWS and rows.shape[0] not in PIECES:
            return torch.cat([self.multiply(piece) for piece in rows.split(_pieces(rows.shape[0]))])
        product: Tensor = self._linear(rows, self.weight, None, "none", [], "")
        return product

    def compile(self, num_rows: int) -> None:
        """Have oneDNN compile for so many rows now, so that no step waits for it."""
        self.multiply(torch.zeros((num_rows, self.num_inputs), dtype=self.weight.dtype))


def padded(num_rows: int) -> int:
    """Return the number of rows that a CPU multiplies in place of this one; four rows take less time than one."""
    granule = 4 if num_rows <= 8 else 8 if num_rows <= 32 else 16
    return -(-num_rows // granule) * granule


PADDED_SIZES = sorted({padded(n) for n in range(1, MAX_ROWS + 1)} | set(PIECES))


def _pieces(num_rows: int) -> list[int]:
    sizes = []
    for size in PIECES:
        sizes += [size] * (num_rows // size)
        num_rows %= size
    return [*sizes, num_rows] if num_rows else sizes


@functools.cache
def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether oneDNN packs weights of this number format here.

    oneDNN is asked for a small product: what it supports depends on the CPU's instructions (bfloat16 needs AVX-512 or
    AVX-NE-CONVERT) and on `ONEDNN_MAX_CPU_ISA`, which no flag of PyTorch reflects.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        PackedLinear(torch.ones((32, 32), dtype=dtype)).multiply(torch.ones((8, 32), dtype=dtype))
    except RuntimeError:
        return False
    return True


def pack(model: MistralForCausalLM) -> None:
    """Pack a fused model's linear layers in place, one after the other; does nothing where oneDNN cannot.

    Measured on two cores with AVX-512 BF16, all matmuls of a decode step: 1.7 times as fast at 1 and 8 sequences, 1.4
    times at 32 (`docs/adr/0007-packed-linear.md`).
    """
    if not can_pack(model.dtype, model.device):
        return
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for module, names in ((attention, ("q_proj", "k_proj", "v_proj")), (mlp, ("gate_proj", "up_proj"))):
            for name in names:
                delattr(module, name)
        for module, names in ((attention, ("qkv", "o_proj")), (mlp, ("gate_up", "down_proj"))):
            for name in names:
                setattr(module, name, PackedLinear(getattr(module, name).weight))
    model.lm_head = PackedLinear(model.lm_head.weight)
