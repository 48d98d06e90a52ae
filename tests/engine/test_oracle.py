"""The oracle: answers equal those of `model.generate` on the same weights, token for token."""

from __future__ import annotations

import asyncio
import warnings
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
from model_server.request import Finished, FinishReason, Request, SamplingParams
from tests.support.fakes import TokenIds
from tests.support.tiny_model import VOCAB_SIZE, tiny_mistral

SEED = 7
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8}

BATCHED = [
    GREEDY,
    GREEDY | {"repetition_penalty": 1.3},
    GREEDY | {"encoder_repetition_penalty": 1.4},
    GREEDY | {"no_repeat_ngram_size": 2},
    GREEDY | {"encoder_no_repeat_ngram_size": 2},
    GREEDY | {"min_new_tokens": 10},
    GREEDY | {"min_length": 60},
    GREEDY | {"bad_words_ids": [[5], [6, 7]]},
    GREEDY | {"suppress_tokens": list(range(20, 200))},
    GREEDY | {"begin_suppress_tokens": list(range(3, 100))},
    GREEDY | {"forced_eos_token_id": 2},
    GREEDY | {"forced_bos_token_id": 9},
    GREEDY | {"exponential_decay_length_penalty": (3, 1.5)},
    GREEDY | {"sequence_bias": [[[10], 5.0], [[11, 12], 3.0]]},
    GREEDY | {"renormalize_logits": True},
    GREEDY | {"remove_invalid_values": True},
    GREEDY | {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 3.0}},
    GREEDY | {"eos_token_id": list(range(2, 40))},
    GREEDY | {"prompt_lookup_num_tokens": 3},
    GREEDY | {"prompt_lookup_num_tokens": 30, "max_matching_ngram_size": 1},
    SAMPLED,
    SAMPLED | {"top_k": 40, "top_p": 0.75},
    SAMPLED | {"top_k": 5},
    SAMPLED | {"top_p": 0.5},
    SAMPLED | {"top_k": 0, "top_p": 0.9},
    SAMPLED | {"top_k": 0},
    SAMPLED | {"top_k": 280},
    SAMPLED | {"min_p": 0.1},
    SAMPLED | {"top_h": 0.4},
    SAMPLED | {"typical_p": 0.5},
    SAMPLED | {"epsilon_cutoff": 0.005},
    SAMPLED | {"eta_cutoff": 0.002},
    SAMPLED | {"repetition_penalty": 1.2, "top_k": 10},
    SAMPLED | {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
    SAMPLED | {"no_repeat_ngram_size": 3, "top_k": 20, "renormalize_logits": True},
]
FALLBACK = [
    GREEDY | {"num_beams": 4},
    GREEDY | {"num_beams": 3, "length_penalty": 0.3, "early_stopping": True},
    GREEDY | {"num_beams": 3, "early_stopping": "never"},
    GREEDY | {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
    SAMPLED | {"num_beams": 3},
    GREEDY | {"guidance_scale": 1.5},
    GREEDY | {"guidance_scale": 1.5, "negative_prompt_ids": [5, 6, 7]},
    SAMPLED | {"guidance_scale": 1.3, "top_k": 20},
    GREEDY | {"use_cache": False},
    GREEDY | {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 3.0, "seeding_scheme": "selfhash"}},
]


def prompt(length: int) -> list[int]:
    """Return a prompt of random tokens, the same for the same length."""
    numbers = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=numbers).tolist()


def expected(model: MistralForCausalLM, prompt_ids: list[int], num_tokens: int, fields: dict[str, Any]) -> list[int]:
    """Return the tokens that plain `generate` returns."""
    fields = dict(fields)
    if "negative_prompt_ids" in fields:
        fields["negative_prompt_ids"] = torch.tensor([fields["negative_prompt_ids"]])
    torch.manual_seed(SEED)
    ids = torch.tensor([prompt_ids])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unfeasible length constraints")
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **fields)
    return output[0, len(prompt_ids) :].tolist()


async def answer(
    engine: Engine, prompt_ids: list[int], num_tokens: int, fields: dict[str, Any]
) -> tuple[list[int], Finished]:
    """Return the tokens that the engine generates for one request, and its last event."""
    text = TokenIds()
    request = Request(prompt_ids, SamplingParams(fields, num_tokens, seed=SEED), [text])
    engine.submit([request])
    events = [event async for event in request.answer()]
    assert isinstance(events[-1], Finished)
    return text.ids, events[-1]


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
    """Sequences of every kind and of different lengths join and leave: none changes the tokens of another."""
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
