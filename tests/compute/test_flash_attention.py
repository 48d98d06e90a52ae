"""`varlen_attn` calls PyTorch's flash attention with the same arguments as PyTorch's public wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from model_server.compute.gpu.flash_attention import varlen_attn


class Calls(TorchDispatchMode):
    """Records the calls of an operator, including the default arguments of its schema."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[list[Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._flash_attention_forward.default:
            given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | (kwargs or {})
            values = [given.get(a.name, a.default_value) for a in func._schema.arguments]
            self.made.append([id(value) if isinstance(value, torch.Tensor) else value for value in values])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (34, 0)])
@pytest.mark.parametrize("num_splits", [None, 4])
def test_the_operator_gets_the_arguments_that_pytorchs_wrapper_gives_it(
    window: tuple[int, int], num_splits: int | None
) -> None:
    q = torch.zeros((3, 4, 128), dtype=torch.float16, device="meta")
    keys, values = (torch.zeros((500, 2, 128), dtype=torch.float16, device="meta") for _ in range(2))
    cu_q, cu_k, lens = (torch.zeros(n, dtype=torch.int32, device="meta") for n in (4, 4, 3))

    with Calls() as ours:
        out = varlen_attn(
            q, keys, values, cu_q, cu_k, 1, 400, scale=0.1, window_size=window, seqused_k=lens, num_splits=num_splits
        )
    with Calls() as theirs:  # calls the operator's body: on the meta device, PyTorch would run a substitute
        varlen._varlen_attn._init_fn(
            q, keys, values, cu_q, cu_k, 1, 400, window == (-1, 0), 0.1, list(window), True, lens, None, num_splits
        )

    assert out.shape == q.shape
    assert len(ours.made) == 1
    assert ours.made == theirs.made
