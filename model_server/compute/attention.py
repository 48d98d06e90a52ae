"""Attention of a prompt chunk in plain PyTorch, over keys and values that are contiguous."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_attention(q: Tensor, keys: Tensor, values: Tensor, start: int, scaling: float, window: int | None) -> Tensor:
    """Attend from a chunk that begins at position `start` to its sequence up to the chunk's end.

    Shapes: q (length, heads, head_dim), keys and values (kv_heads, start + length, head_dim); the output is as q.
    """
    group = q.shape[1] // keys.shape[0]
    length, end = len(q), keys.shape[1]
    mask = None
    if start or (window is not None and end > window):
        mask = torch.ones((length, end), dtype=torch.bool, device=q.device).tril(start)
        if window is not None:
            mask = mask.triu(start - window + 1)
    # Keys are repeated for the group: the CPU's fast attention kernel wants as many key heads as query heads.
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.repeat_interleave(group, 0)[None],
        values.repeat_interleave(group, 0)[None],
        attn_mask=mask,
        is_causal=mask is None and length > 1,
        scale=scaling,
    )
    return out[0].transpose(0, 1)
