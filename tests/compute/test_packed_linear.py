"""Packed linear layers: every shape gives the same product, few sizes are multiplied, and every CPU is supported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model_server.compute.cpu.packed_linear import MAX_ROWS, PADDED_SIZES, PackedLinear, can_pack, pack
from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.dense import DenseKVCache
from model_server.compute.runner import Runner
from tests.support.tiny_model import tiny_mistral

packs = pytest.mark.skipif(
    not can_pack(torch.float32, torch.device("cpu")), reason="oneDNN does not pack weights on this machine"
)


class MultipliedRows(TorchDispatchMode):
    """Records the number of rows of every oneDNN matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "_linear_pointwise" in str(func):
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@packs
@pytest.mark.parametrize(
    "shape",
    [(0, 32), (1, 32), (5, 32), (MAX_ROWS, 32), (449, 32), (1023, 32), (1, 300, 32), (4, 100, 32), (3, 7, 32)],
    ids=str,
)
def test_packed_layer_gives_the_product_in_pieces_of_few_sizes(shape: tuple[int, ...]) -> None:
    weight, x = torch.randn(48, 32), torch.randn(shape)
    packed = PackedLinear(weight)

    with torch.inference_mode(), MultipliedRows() as multiplied:
        product = packed(x)

    torch.testing.assert_close(product, F.linear(x, weight))
    num_rows = x.numel() // 32
    assert num_rows <= sum(multiplied.rows) < num_rows + 16
    assert set(multiplied.rows) <= (set(PADDED_SIZES) if num_rows else {0})


@packs
def test_step_multiplies_only_sizes_that_are_compiled_ahead() -> None:
    model = tiny_mistral()
    fuse(model)
    pack(model)
    cache = DenseKVCache(
        model.config, max_batch_size=3, max_sequence_tokens=400, dtype=model.dtype, device=model.device
    )
    offsets = [cache.allocate(400) or 0 for _ in range(3)]
    runner = Runner(model, cache)

    with MultipliedRows() as multiplied:
        runner.forward([], [TokenRange(offset, 0, [5] * (50 + offset // 400)) for offset in offsets], [0, 50, 101])
        runner.forward([TokenRange(offsets[0], 50, [5])], [TokenRange(offsets[1], 51, [5] * 300)], [0, 300])
        runner.forward([TokenRange(offset, 60, [5]) for offset in offsets], [], [0, 1, 2])

    assert set(multiplied.rows) <= set(PADDED_SIZES)


LOGITS_IN_BFLOAT16 = """
import torch
from model_server.compute.cpu.packed_linear import can_pack, pack
from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.dense import DenseKVCache
from model_server.compute.runner import Runner
from tests.support.tiny_model import tiny_mistral

assert torch.backends.cpu.get_cpu_capability() != "AVX512"
model = tiny_mistral()
exact = model(torch.tensor([[5, 6, 7, 8]])).logits[0, -1]
model = model.bfloat16()
fuse(model)
pack(model)
cache = DenseKVCache(model.config, max_batch_size=1, max_sequence_tokens=32, dtype=model.dtype, device=model.device)
logits = Runner(model, cache).forward([], [TokenRange(0, 0, [5, 6, 7, 8])], [3])[0]
print(can_pack(torch.bfloat16, torch.device("cpu")), float((logits - exact).abs().max()))
"""


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"), reason="this CPU is no x86 with AVX2"
)
def test_cpu_without_avx512_computes_bfloat16_unpacked() -> None:
    """oneDNN refuses to pack bfloat16 on such a CPU; the server once exited with a traceback."""
    environ = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}

    out = subprocess.run(
        [sys.executable, "-c", LOGITS_IN_BFLOAT16], env=environ, capture_output=True, text=True, check=True
    ).stdout

    packed, difference = out.split()
    assert packed == "False"
    assert float(difference) < 0.3
