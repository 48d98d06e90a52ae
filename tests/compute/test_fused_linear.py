"""Packed projections: the same product, whatever the shape, in pieces that oneDNN has met."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model_server.compute.fused_linear import MOST_ROWS, PADDED_SIZES, Projection, fuse, pack, packable
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.dense import DenseKVCache
from model_server.compute.runner import Runner
from tests.support.tiny_model import tiny_mistral

pytestmark = pytest.mark.skipif(
    not packable(torch.float32, torch.device("cpu")), reason="oneDNN does not pack weights on this machine"
)


class Multiplied(TorchDispatchMode):
    """Notes how many rows oneDNN is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "_linear_pointwise" in str(func):
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "shape",
    [(0, 32), (1, 32), (5, 32), (MOST_ROWS, 32), (449, 32), (1023, 32), (1, 300, 32), (4, 100, 32), (3, 7, 32)],
    ids=str,
)
def test_a_packed_projection_gives_the_product_in_pieces_of_few_sizes(shape: tuple[int, ...]) -> None:
    weight, x = torch.randn(48, 32), torch.randn(shape)
    projection = Projection(weight)
    projection.pack()

    with torch.inference_mode(), Multiplied() as multiplied:
        product = projection(x)

    torch.testing.assert_close(product, F.linear(x, weight))
    num_rows = x.numel() // 32
    assert num_rows <= sum(multiplied.rows) < num_rows + 16
    assert set(multiplied.rows) <= (set(PADDED_SIZES) if num_rows else {0})


def test_a_step_multiplies_numbers_of_rows_that_are_compiled_ahead() -> None:
    model = tiny_mistral()
    fuse(model)
    pack(model)
    slots = DenseKVCache(model.config, num_slots=3, slot_len=400, dtype=model.dtype, device=model.device)
    places = [slots.allocate(400) or 0 for _ in range(3)]
    runner = Runner(model, slots)

    with Multiplied() as multiplied:
        runner.forward([], [TokenRange(place, 0, [5] * (50 + place // 400)) for place in places], [0, 50, 101])
        runner.forward([TokenRange(places[0], 50, [5])], [TokenRange(places[1], 51, [5] * 300)], [0, 300])
        runner.forward([TokenRange(place, 60, [5]) for place in places], [], [0, 1, 2])

    assert set(multiplied.rows) <= set(PADDED_SIZES)
