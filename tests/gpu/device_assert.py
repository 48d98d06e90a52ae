"""Runs an engine on whose device an assertion fails, and prints the outcome: `python -m tests.gpu.device_assert cuda`.

It needs a separate process: after a device-side assert, every CUDA call of the process fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from typing import Any

import torch

from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.runner import Runner
from model_server.engine.config import EngineConfig
from model_server.engine.engine import Engine
from tests.support.engine_requests import events, request
from tests.support.tiny_model import tiny_mistral


def make_runner(device: torch.device) -> Runner:
    on_card = device.type == "cuda"
    model = tiny_mistral(head_dim=128).to(device, torch.float16 if on_card else torch.float32)
    fuse(model)
    cache = ContiguousKVCache(
        model.config, num_tokens=500, max_sequence_tokens=100, dtype=model.dtype, device=device, flash=on_card
    )
    runner = Runner(model, cache)
    runner.is_async = True
    forward = runner.forward

    def failing(*arguments: Any) -> torch.Tensor:
        logits = forward(*arguments)
        if not on_card:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        torch._assert_async(torch.zeros((), device=device))
        return logits

    runner.forward = failing  # type: ignore[method-assign]
    return runner


async def main() -> None:
    config = EngineConfig(
        max_batch_size=2,
        max_queue_size=2,
        max_fallback_tokens=0,
        max_prefill_tokens_per_step=32,
        max_prefill_tokens_when_idle=32,
        prefix_caching=True,
        stall_s=30.0,
    )
    tokenizer: Any = None
    engine = Engine(make_runner(torch.device(sys.argv[1])), tokenizer, config)
    engine.start()
    requests = [request(8), request(8)]
    engine.submit(requests)
    answers = await events(*requests)
    for thread in threading.enumerate():
        if thread.name == "batch":  # the ended thread frees its tensors
            thread.join(10)
    print(json.dumps({"dead": engine.dead, "answers": [str(answer) for answer in answers]}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
