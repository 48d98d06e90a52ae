"""Checks at startup whether flash attention works on this device: compares small steps with plain attention.

The check runs the kernel, because no document lists the cards, dtypes and head sizes that it supports.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import MistralConfig

from model_server.compute.kv_cache.base import TokenRange, head_dim
from model_server.compute.kv_cache.contiguous import ContiguousKVCache

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.06}
"""The largest allowed difference. Outputs reach 4, where adjacent bfloat16 numbers differ by 0.03."""


def flash_attention_unavailable_reason(config: MistralConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why flash attention cannot be used on this device, or None if it works and its results are right.

    Raises:
        torch.AcceleratorError: the device is broken; nothing more can run on it.
    """
    if device.type != "cuda":
        return f"the device is a {device.type}"
    return verify_flash_attention(config, dtype, device)


@torch.inference_mode()
def verify_flash_attention(config: MistralConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return the error of flash attention over a contiguous KV cache, or None.

    The output must match plain attention over the same cache, within `TOLERANCE`. Both read the same keys and values,
    so the check also compares these with the keys and values that the step should have written.

    Raises:
        torch.AcceleratorError: the device is broken; nothing more can run on it.
    """
    num_heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
    one_layer = MistralConfig(
        num_hidden_layers=1, num_attention_heads=num_heads, num_key_value_heads=kv_heads, head_dim=size
    )
    one_layer.sliding_window = config.sliding_window and 35  # small enough to matter in sequences of 100 tokens
    generator = torch.Generator(device).manual_seed(0)

    def random(num_tokens: int, heads: int) -> Tensor:
        return torch.randn((num_tokens, heads, size), dtype=dtype, device=device, generator=generator)

    cache = ContiguousKVCache(
        one_layer, num_tokens=512, max_sequence_tokens=300, dtype=dtype, device=device, flash=True
    )
    cache.keys[0].copy_(random(513, kv_heads))
    cache.values[0].copy_(random(513, kv_heads))
    decode = [TokenRange(300, 40, [0]), TokenRange(7, 99, [0])]
    prefill = [TokenRange(200, 20, [0] * 30), TokenRange(400, 0, [0] * 5)]
    try:
        for ranges in ((decode, []), ([], prefill), (decode, prefill)):
            step = cache.step(*ranges)
            slots = [r.kv_offset + position for group in ranges for r in group for position in range(r.start, r.kv_len)]
            q, kv = random(len(slots), num_heads), random(len(slots), 2 * kv_heads).unflatten(1, (2, kv_heads))
            outputs = {}
            for cache.flash in (True, False):
                outputs[cache.flash] = step.attend(0, q, kv, size**-0.5)
            written = torch.stack((cache.keys[0][slots], cache.values[0][slots]), 1)
            if not torch.equal(written, kv):
                return "keys and values are not written where attention reads them"
            difference = float((outputs[True] - outputs[False]).abs().max())
            if not difference < TOLERANCE[dtype]:
                return f"its output differs from plain attention's by {difference:.2g}"
    except torch.AcceleratorError:
        raise
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    return None
