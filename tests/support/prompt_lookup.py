"""Requests with prompt lookup, and a model for whose text the drafts are right."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import MistralForCausalLM

from model_server.compute.cpu.packed_linear import pack
from model_server.compute.fused_linear import fuse
from model_server.request import Event, Finished, Request
from model_server.telemetry import metrics
from tests.support.engine_requests import request
from tests.support.oracle import GREEDY
from tests.support.tiny_model import tiny_mistral

VOCAB_SIZE = 16
LOOKUP: dict[str, Any] = {"prompt_lookup_num_tokens": 5}
both_loops = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])


def make_chain_model(dtype: torch.dtype) -> MistralForCausalLM:
    """Return a model whose next token depends only on the last: 3 and 4 alternate, and from 5 on it counts up.

    The projections that add to the residual are zero, so the embedding reaches the head, which encodes the next token.
    """
    model = tiny_mistral(vocab_size=VOCAB_SIZE)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE, model.config.hidden_size))
    following = [0, 1, 2, 4, 3, *range(6, VOCAB_SIZE), 0]
    model.lm_head.weight.zero_()[following, range(VOCAB_SIZE)] = 0.5
    model.to(dtype)
    fuse(model)
    pack(model)
    return model


def prompt(seed: int, length: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(3, VOCAB_SIZE) for _ in range(length)]


def drafted() -> tuple[float, float]:
    """Return the numbers of tokens drafted and accepted so far."""
    return metrics.drafted_tokens_total._value.get(), metrics.drafted_tokens_accepted_total._value.get()


def looping(num_tokens: int = 30, **changes: Any) -> Request:
    """Return a request with prompt lookup whose answer by the chain model repeats two tokens."""
    fields = GREEDY | LOOKUP | {"eos_token_id": None}
    return request(num_tokens, [9, 3], sampling={"generate": fields} | changes.pop("sampling", {}), **changes)


def texts(found: list[Event]) -> list[str]:
    return [event.text.strip() for event in found if not isinstance(event, Finished)]
