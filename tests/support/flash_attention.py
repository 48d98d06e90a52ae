"""A stand-in for `gpu.flash_attention.varlen_attn`, whose kernel exists on CUDA only."""

from __future__ import annotations

import torch
from torch import Tensor


def documented_varlen_attn(
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
    """Compute attention as documented in `torch.nn.attention.varlen` (torch 2.13), in plain arithmetic.

    Causal masks and windows are aligned to the last key, as FlashAttention aligns them.
    """
    assert {cu_seq_q.dtype, cu_seq_k.dtype, seqused_k.dtype} == {torch.int32}
    assert len(cu_seq_q) == len(cu_seq_k) == len(seqused_k) + 1
    assert num_splits is None or max_q == 1, "FlashAttention 2 splits keys only for a single query"
    return _attend(query, key, value, cu_seq_q, cu_seq_k, seqused_k, max_q, max_k, scale, list(window_size))


@torch.library.custom_op("tests::varlen_attn", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    seqused_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window_size: list[int],
) -> Tensor:
    """Wrap the computation in one operation, because recorders of operations see the kernel as one operation."""
    out = torch.empty_like(query)
    left, right = window_size
    for sequence, used in enumerate(seqused_k.tolist()):
        first, last = cu_seq_q[sequence : sequence + 2].tolist()
        start = int(cu_seq_k[sequence])
        assert last - first <= max_q
        assert used <= max_k
        keys, values = (
            t[start : start + used].repeat_interleave(query.shape[1] // key.shape[1], 1).float() for t in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", query[first:last].float(), keys) * scale
        distance = torch.arange(used) - torch.arange(used - (last - first), used)[:, None]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if right >= 0:
            hidden |= distance > right
        if left >= 0:
            hidden |= distance < -left
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
    return out
