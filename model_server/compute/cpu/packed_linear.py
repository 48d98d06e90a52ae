"""Packed weights: linear layers for a CPU in oneDNN's blocked layout.

oneDNN compiles a matmul for each new number of rows. A compilation takes milliseconds and keeps half a megabyte. Rows
are therefore padded to a few sizes, and long inputs are split into pieces of a few sizes.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MistralForCausalLM

from model_server.compute.fused_linear import Linear

PACKED_FOR_ROWS = 8
"""The number of rows that the layout is optimized for. Of 1, 8, 32 and 128, it was always close to the fastest."""
MAX_ROWS, PIECES = 160, (512, 256, 128)
"""Inputs of more than MAX_ROWS rows are multiplied in pieces of these sizes, the largest first."""


class PackedLinear(Linear):
    """A linear layer with its weight in oneDNN's blocked layout; the weight cannot be read back."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR_ROWS))
        self.num_outputs, self.num_inputs = weight.shape
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x (..., inputs); return (..., outputs)."""
        rows = x.flatten(0, -2)
        missing = padded(len(rows)) - len(rows)
        product = self.multiply(F.pad(rows, (0, 0, 0, missing)) if missing else rows)
        return product[: len(product) - missing].view(*x.shape[:-1], self.num_outputs)

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply (rows, inputs); return (rows, outputs). The caller pads the rows with `padded`, as steps do.

        Decode steps call it instead of `forward`, whose checks and reshapes take 10 us.
        """
        if rows.shape[0] > MAX_ROWS and rows.shape[0] not in PIECES:
            return torch.cat([self.multiply(piece) for piece in rows.split(_pieces(rows.shape[0]))])
        product: Tensor = self._linear(rows, self.weight, None, "none", [], "")
        return product

    def compile(self, num_rows: int) -> None:
        """Make oneDNN compile the matmul for `num_rows` rows, so that no step waits for the compilation."""
        self.multiply(torch.zeros((num_rows, self.num_inputs), dtype=self.weight.dtype))


def padded(num_rows: int) -> int:
    """Return the number of rows after padding. On a CPU, four rows take less time than one."""
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
    """Return whether oneDNN can pack weights of this dtype on this device.

    The function tries a small matmul. Support depends on the CPU's instructions (bfloat16 needs AVX-512 or
    AVX-NE-CONVERT) and on `ONEDNN_MAX_CPU_ISA`, and no flag of PyTorch reports it.
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
    """Pack the linear layers of a fused model in place, one after the other; do nothing if `can_pack` returns false.

    On two cores with AVX-512 BF16, the matmuls of a decode step ran 1.7 times as fast at 1 and 8 sequences, and 1.4
    times as fast at 32 (`docs/adr/0007-packed-linear.md`).
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
