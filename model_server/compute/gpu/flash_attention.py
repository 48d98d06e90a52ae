"""Calls PyTorch's flash attention for sequences of different lengths without the `torch.nn.attention.varlen` wrapper.

The wrapper is a custom operator in Python. Each call takes tens of microseconds and launches a kernel for a random
state, which attention without dropout does not use. An eager step of a 7B model makes 32 to 64 calls.
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
    """Compute `torch.nn.attention.varlen.varlen_attn` with grouped-query attention (fewer key heads than query heads).

    Shapes: query (tokens, heads, head_dim), key and value (pool tokens, kv_heads, head_dim). The output has the query's
    shape.
    """
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
