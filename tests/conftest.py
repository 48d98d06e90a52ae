"""Fixtures that several modules share: a small model of the real architecture, and engines around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM
from transformers.utils import logging as transformers_logging

from model_server.engine import Engine
from model_server.runner import fuse

VOCAB_SIZE = 300


def tiny_mistral(**changes: object) -> MistralForCausalLM:
    """Return a random Mistral of three small layers, different for no seed and no reason."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # Ten times the usual: sharper logits, so that answers differ from one another and do not repeat themselves.
        "initializer_range": 0.2,
    }
    return MistralForCausalLM(MistralConfig(**(settings | changes))).eval().requires_grad_(False)


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    """Its advice on generation flags is for people at a prompt."""
    transformers_logging.set_verbosity_error()


@pytest.fixture(scope="session")
def model() -> MistralForCausalLM:
    """A tiny Mistral as the server holds it: fused."""
    model = tiny_mistral()
    fuse(model)
    return model


@pytest.fixture
def make_engine(model: MistralForCausalLM) -> Iterator[Callable[..., Engine]]:
    """A factory of started engines, stopped when the test ends."""
    engines = []

    def make(model: MistralForCausalLM = model, **changes: object) -> Engine:
        settings = {
            "max_model_len": 256,
            "num_slots": 6,
            "max_queue_size": 100,
            "own_lane_tokens": 5000,
            "prefill_tokens": 32,
            "stall_s": 60.0,
        }
        engine = Engine(model, None, **(settings | changes))  # type: ignore[arg-type]
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.stop()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio, as the server does."""
    return "asyncio"
