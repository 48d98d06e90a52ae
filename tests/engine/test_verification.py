"""Verified drafts change only the speed of an answer."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch
from transformers import MistralForCausalLM

from model_server.request import Event, Finished, Request
from tests.support.engine_requests import MakeEngine, answers, request, until
from tests.support.fakes import OnlyTokens
from tests.support.oracle import BATCHED, GREEDY, SAMPLED, answer, expected
from tests.support.prompt_lookup import (
    LOOKUP,
    both_loops,
    drafted,
    looping,
    make_chain_model,
    prompt,
    texts,
)

OTHER_VOCABULARY = {"suppress_tokens", "begin_suppress_tokens", "eos_token_id", "prompt_lookup_num_tokens"}
KINDS = [
    *(fields for fields in BATCHED if not OTHER_VOCABULARY & fields.keys()),
    GREEDY | {"eos_token_id": [2, 5]},
    GREEDY | {"suppress_tokens": [4, 7]},
    SAMPLED | {"temperature": 0.3},
]


@pytest.mark.parametrize("fields", [f for f in KINDS if not f["do_sample"]], ids=str)
async def test_a_greedy_answer_equals_generate_with_prompt_lookup(
    make_engine: MakeEngine,
    plain_repeating_model: MistralForCausalLM,
    repeating_model: MistralForCausalLM,
    fields: dict[str, Any],
) -> None:
    engine = make_engine(repeating_model)
    jobs = [(prompt(seed, 5 + 9 * seed), 40, fields | LOOKUP) for seed in range(2)]

    given_answers = await asyncio.gather(*(answer(engine, *job) for job in jobs))

    assert [ids for ids, _ in given_answers] == [expected(plain_repeating_model, *job) for job in jobs]


@pytest.mark.parametrize("fields", [f for f in KINDS if f["do_sample"]], ids=str)
async def test_a_sampled_answer_with_a_seed_equals_generate_without_prompt_lookup(
    make_engine: MakeEngine,
    plain_repeating_model: MistralForCausalLM,
    repeating_model: MistralForCausalLM,
    fields: dict[str, Any],
) -> None:
    engine = make_engine(repeating_model)
    jobs = [(prompt(seed, 5 + 9 * seed), 40, fields) for seed in range(2)]

    given_answers = await asyncio.gather(*(answer(engine, ids, n, fields | LOOKUP) for ids, n, fields in jobs))

    assert [ids for ids, _ in given_answers] == [expected(plain_repeating_model, *job) for job in jobs]


def random_requests(seed: int, *, lookup: bool) -> list[Request]:
    """Return random requests; the same seed gives the same requests, with or without prompt lookup."""
    draw = random.Random(seed)
    made = []
    for number in range(40):
        fields = dict(draw.choice(KINDS))
        ids, num_tokens = prompt(number, draw.randrange(1, 90)), draw.randrange(1, 60)
        guesses = {"prompt_lookup_num_tokens": draw.randrange(1, 20), "max_matching_ngram_size": draw.randrange(1, 5)}
        sampling = {"seed": number, "logprobs": draw.choice([None, 0, 2])}
        if draw.random() < 0.8 and lookup:
            fields |= guesses
        made.append(request(num_tokens, ids, sampling={"generate": fields} | sampling))
    return made


def without_logprobs(found: list[Event]) -> list[Any]:
    """Return the events without log-probabilities, because float32 rounds differently in batches of other shapes."""
    return [
        event if isinstance(event, Finished) else (event.text, [(t.id, [id for id, _ in t.top]) for t in event.tokens])
        for event in found
    ]


@both_loops
async def test_random_requests_get_the_same_events_with_and_without_prompt_lookup(
    make_engine: MakeEngine, repeating_model: MistralForCausalLM, overlap: bool
) -> None:
    """Prompts, lengths, drafts, parameters and log-probabilities are random; sequences join and leave the batch."""
    before = drafted()
    without = await answers(make_engine(repeating_model), random_requests(1, lookup=False))
    assert drafted() == before
    engine = make_engine(repeating_model, overlap=overlap)
    with_lookup = await answers(engine, random_requests(1, lookup=True))

    guessed, right = (after - earlier for after, earlier in zip(drafted(), before, strict=True))
    assert guessed > right > 100
    assert list(map(without_logprobs, with_lookup)) == list(map(without_logprobs, without))
    await until(lambda: engine.running == 0)
    assert engine.kv_usage == 0
    assert engine.runner.kv_cache.num_allocatable([10] * 6) == 6


@both_loops
async def test_a_request_without_prompt_lookup_is_not_changed_by_one_with_it(
    make_engine: MakeEngine, chain_model: MistralForCausalLM, overlap: bool
) -> None:
    def others() -> list[Request]:
        return [request(40, prompt(seed, 20), sampling={"logprobs": 1}) for seed in range(2)]

    by_themselves = await answers(make_engine(chain_model), others())
    before = drafted()
    beside = await answers(make_engine(chain_model, overlap=overlap), [looping(), *others()])

    assert drafted()[1] > before[1]
    assert beside[1:] == by_themselves


async def test_a_grammar_holds_for_guessed_tokens(make_engine: MakeEngine, chain_model: MistralForCausalLM) -> None:
    """The answer repeats 3 and 4 until the grammar forbids 4."""

    class FourTimes(OnlyTokens):
        def accept(self, token_id: int) -> None:
            super().accept(token_id)
            if self.accepted.count(4) == 4:
                self.allowed = {3, 5}

    engine = make_engine(chain_model)
    with_lookup, without = looping(matcher=FourTimes({3, 4})), looping(matcher=FourTimes({3, 4}))
    without.sampling.generate.pop("prompt_lookup_num_tokens")
    before = drafted()

    found, wanted = await answers(engine, [with_lookup, without])

    guessed, right = (after - earlier for after, earlier in zip(drafted(), before, strict=True))
    assert guessed > right > 5
    assert texts(found)[:8] == ["4", "3"] * 4
    assert "4" not in texts(found)[8:]
    assert found == wanted
    assert with_lookup.matcher.accepted == with_lookup.detokenizers[0].ids


async def test_the_prefix_cache_holds_no_wrong_guess(
    make_engine: MakeEngine, plain_repeating_model: MistralForCausalLM, repeating_model: MistralForCausalLM
) -> None:
    """The next turn continues an answer with many drafted tokens, some of them wrong."""
    engine = make_engine(repeating_model)
    before = drafted()
    fields = SAMPLED | LOOKUP | {"temperature": 0.3, "eos_token_id": None}
    turns = []
    for seed in range(4):
        first = request(60, prompt(seed, 30), sampling={"generate": fields, "seed": seed})
        [found] = await answers(engine, [first])
        turns.append([*first.prompt_ids, *map(int, texts(found)), 5, 6])
    guessed, right = (after - earlier for after, earlier in zip(drafted(), before, strict=True))

    second = [request(20, turn, sampling={"generate": GREEDY | {"eos_token_id": None}}) for turn in turns]
    found = await answers(engine, second)

    assert guessed > right > 10
    assert all(one.num_cached_tokens == 89 for one in second)
    greedy = GREEDY | {"eos_token_id": None}
    wanted = [expected(plain_repeating_model, turn, 20, greedy) for turn in turns]
    assert [list(map(int, texts(one))) for one in found] == wanted


async def test_in_16_bits_a_request_with_a_seed_guesses_nothing(make_engine: MakeEngine) -> None:
    """Drafts change the rounding of a step, but the same seed must give the same text in any batch."""
    engine = make_engine(make_chain_model(torch.bfloat16))
    cold = SAMPLED | LOOKUP | {"temperature": 0.01, "eos_token_id": None}
    counts = [drafted()]
    for seed in (3, None):
        [found] = await answers(engine, [request(20, [9, 3], sampling={"generate": cold, "seed": seed})])
        assert texts(found) == ["4", "3"] * 10
        counts.append(drafted())

    assert counts[0] == counts[1]
    assert counts[1] < counts[2]
