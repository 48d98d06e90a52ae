"""Answers equal those of `model.generate` on the same weights, token for token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MistralForCausalLM

from model_server.compute.cpu.packed_linear import pack
from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.dense import DenseKVCache
from model_server.compute.runner import Runner
from model_server.engine.engine import Engine
from model_server.request import Finished, FinishReason
from tests.support.oracle import BATCHED, FALLBACK, GREEDY, answer, expected, prompt
from tests.support.tiny_model import tiny_mistral


@pytest.mark.parametrize("fields", BATCHED + FALLBACK, ids=str)
async def test_an_answer_equals_generate_with_the_same_field(
    plain_model: MistralForCausalLM, make_engine: Callable[..., Engine], fields: dict[str, Any]
) -> None:
    ids, final = await answer(make_engine(), prompt(17), 24, fields)

    assert ids == expected(plain_model, prompt(17), 24, fields)
    assert final.completion_tokens == len(ids)


async def test_answers_in_a_full_batch_equal_generate(
    plain_model: MistralForCausalLM, make_engine: Callable[..., Engine]
) -> None:
    """Sequences of every kind and length join and leave the batch without changing each other's tokens."""
    engine = make_engine(max_batch_size=6)
    jobs = [(prompt(3 + 7 * (i % 10)), 8 + 3 * (i % 5), fields) for i, fields in enumerate(BATCHED * 2 + FALLBACK)]

    answers = await asyncio.gather(*(answer(engine, *job) for job in jobs))

    assert [ids for ids, _ in answers] == [expected(plain_model, *job) for job in jobs]
    assert (engine.running, engine.waiting, engine.kv_usage) == (0, 0, 0)


@pytest.mark.parametrize(
    "changes",
    [{"sliding_window": 13}, {"tie_word_embeddings": True}, {"head_dim": 32}, {"num_key_value_heads": 4}],
    ids=str,
)
async def test_every_shape_of_the_architecture_equals_generate(
    make_engine: Callable[..., Engine], changes: dict[str, Any]
) -> None:
    model = tiny_mistral(**changes)
    jobs = [(prompt(n), 30, GREEDY) for n in (2, 20, 90)]
    wanted = [expected(model, *job) for job in jobs]
    fuse(model)
    pack(model)
    engine = make_engine(model)

    answers = await asyncio.gather(*(answer(engine, *job) for job in jobs))

    assert [ids for ids, _ in answers] == wanted


async def test_a_long_sequence_among_short_ones_equals_generate(
    plain_model: MistralForCausalLM, make_engine: Callable[..., Engine]
) -> None:
    """The long sequence gets a separate attention call."""
    engine = make_engine(max_model_len=512, max_batch_size=4)
    jobs = [(prompt(n), 20, GREEDY) for n in (400, 5, 9, 12, 300)]

    answers = await asyncio.gather(*(answer(engine, *job) for job in jobs))

    assert [ids for ids, _ in answers] == [expected(plain_model, *job) for job in jobs]


async def test_an_answer_that_fills_its_tokens_ends_with_length(make_engine: Callable[..., Engine]) -> None:
    _, final = await answer(make_engine(), prompt(5), 4, GREEDY | {"min_new_tokens": 10})

    assert final == Finished(FinishReason.LENGTH, prompt_tokens=5, completion_tokens=4)


async def test_an_answer_with_an_end_of_sequence_token_ends_with_stop(
    plain_model: MistralForCausalLM, make_engine: Callable[..., Engine]
) -> None:
    third = expected(plain_model, prompt(5), 3, GREEDY)[2]

    ids, final = await answer(make_engine(), prompt(5), 20, GREEDY | {"eos_token_id": third})

    assert (final.finish_reason, ids[-1]) == (FinishReason.STOP, third)


def test_in_bfloat16_the_decoder_rounds_where_transformers_does() -> None:
    """A step of one prompt gives exactly the logits of the model's forward."""
    model = tiny_mistral().bfloat16()
    wanted = model(torch.tensor([prompt(20)])).logits[0, -1]
    fuse(model)
    slots = DenseKVCache(model.config, max_batch_size=1, max_sequence_tokens=64, dtype=model.dtype, device=model.device)

    logits = Runner(model, slots).forward([], [TokenRange(0, 0, prompt(20))], [19])

    assert torch.equal(logits[0], wanted.float())
