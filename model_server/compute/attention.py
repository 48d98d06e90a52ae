"""Attention for a chunk of one sequence, in plain PyTorch. The keys and values of the sequence must be contiguous."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_attention(q: Tensor, keys: Tensor, values: Tensor, start: int, scaling: float, window: int | None) -> Tensor:
    """Return the attention output of a chunk that begins at position `start` of its sequence.

    Shapes: q (length, heads, head_dim), keys and values (kv_heads, start + length, head_dim). The output has q's shape.
    """
    group = q.shape[1] // keys.shape[0]
    length, end = len(q), keys.shape[1]
    mask = None
    if start or (window is not None and end > window):
        mask = visible_keys(length, start, window, q.device)
    # Keys are repeated for the group: the CPU's fast attention kernel requires as many key heads as query heads.
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.repeat_interleave(group, 0)[None],
        values.repeat_interleave(group, 0)[None],
        attn_mask=mask,
        is_causal=mask is None and length > 1,
        scale=scaling,
    )
    return out[0].transpose(0, 1)


def short_chunk_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Compute `chunk_attention` without copying keys: the query heads of a group become rows of one head.

    For a short chunk of a long sequence, copying the keys takes longer than attention itself.
    """
    length, num_heads, size = q.shape
    kv_heads = keys.shape[0]
    grouped = q.view(length, kv_heads, -1, size).permute(1, 2, 0, 3).reshape(kv_heads, 1, -1, size)
    out = F.scaled_dot_product_attention(grouped, keys[:, None], values[:, None], attn_mask=mask, scale=scaling)
    return out.view(kv_heads, -1, length, size).permute(2, 0, 1, 3).reshape(length, num_heads, size)


def short_chunk_mask(
    length: int, start: int, window: int | None, group: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the mask that `short_chunk_attention` adds to the scores: (group * length, start + length).

    Args:
        group: the number of query heads that share a key head.
    """
    visible = visible_keys(length, start, window, device)
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf).repeat(group, 1)


def visible_keys(length: int, start: int, window: int | None, device: torch.device) -> Tensor:
    """Return a boolean mask (length, start + length): the keys that each token of the chunk attends to."""
    mask = torch.ones((length, start + length), dtype=torch.bool, device=device).tril(start)
    return mask if window is None else mask.triu(start - window + 1)
