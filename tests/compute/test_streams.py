"""On a GPU, the stream of the batch has priority over the stream of the fallback; a CPU has no streams."""

from __future__ import annotations

import pytest
import torch

from model_server.compute.gpu.streams import batch_stream, fallback_stream
from tests.support.cuda import FakeCuda, Stream


def test_batch_is_scheduled_before_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []
    FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream.priority))
    device = torch.device("cuda")

    batch_stream(device)
    fallback_stream(device)

    assert entered == [-1, 0]
    assert Stream.made == 2


def test_cpu_has_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)

    with batch_stream(torch.device("cpu")), fallback_stream(torch.device("cpu")):
        pass

    assert Stream.made == 0
