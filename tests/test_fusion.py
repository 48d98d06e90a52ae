"""Packed projections: the same product, whatever the shape, in pieces that oneDNN has met."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model_server.fusion import MOST_ROWS, Projection, packable

pytestmark = pytest.mark.skipif(
    not packable(torch.float32, torch.device("cpu")), reason="oneDNN does not pack weights on this machine"
)


@pytest.mark.parametrize("shape", [(1, 32), (MOST_ROWS, 32), (449, 32), (1, 300, 32), (4, 100, 32)], ids=str)
def test_a_packed_projection_gives_the_product_in_pieces_of_few_sizes(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = torch.randn(48, 32), torch.randn(shape)
    projection = Projection(weight)
    projection.pack()
    rows: list[int] = []
    multiply = Projection._multiply
    monkeypatch.setattr(Projection, "_multiply", lambda self, x: rows.append(x.numel() // 32) or multiply(self, x))

    torch.testing.assert_close(projection(x), F.linear(x, weight))
    assert sum(rows) == x.numel() // 32
    assert max(rows) <= MOST_ROWS
