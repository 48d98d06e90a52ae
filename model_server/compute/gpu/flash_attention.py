"""PyTorch's flash attention for sequences of different lengths, without the wrapper of `torch.nn.attention.varlen`.

The wrapper is a custom operator written in Python: it takes tens of microseconds a call, and launches a kernel for a
random state that attention without dropout does not use. An eager step of a 7B model calls it 32 to 64 times.
"""

from __future__ import annotations

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    seqused_k: Tensor,
    num_splits: int | None = None,
) -> Tensor:
    """Attend as `torch.nn.attention.varlen.varlen_attn` does, with heads of keys for groups of query heads."""
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        0.0,  # dropout
        window_size == (-1, 0),  # causal
        return_debug_mask=False,
        scale=scale,
        window_size_left=window_size[0],
        window_size_right=window_size[1],
        seqused_k=seqused_k,
        **({} if num_splits is None else {"num_splits": num_splits}),  # PyTorch 2.11 has no such argument
    )[0]
    return out
