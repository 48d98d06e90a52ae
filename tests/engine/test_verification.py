"""Verified guesses: they change the speed of an answer and nothing else."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import MistralForCausalLM

from model_server.compute.cpu.packed_linear import pack
from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.base import TokenRange
from model_server.engine import batch
from model_server.engine.engine import Engine
from model_server.errors import InternalError
from model_server.request import Event, Finished, FinishReason, Request
from model_server.telemetry import metrics
from tests.engine.test_oracle import BATCHED, GREEDY, SAMPLED, answer, expected
from tests.support.engine_requests import Gate, MakeEngine, events, launches_and_reads, request, until
from tests.support.fakes import OnlyTokens, Stopping
from tests.support.tiny_model import tiny_mistral

VOCAB_SIZE = 16
LOOKUP: dict[str, Any] = {"prompt_lookup_num_tokens": 5}
both_loops = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])


@pytest.fixture(scope="module")
def plain_repeating_model() -> MistralForCausalLM:
    """A random model of few tokens: its text repeats itself and its prompt, but not for long."""
    return tiny_mistral(vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def repeating_model() -> MistralForCausalLM:
    """The same as the server holds it."""
    model = tiny_mistral(vocab_size=VOCAB_SIZE)
    fuse(model)
    pack(model)
    return model


def make_chain_model(dtype: torch.dtype) -> MistralForCausalLM:
    """Return a model whose next token follows from the last alone: 3 and 4 take turns, and from 5 on it counts up.

    The projections that add to the residual are zero, so the embedding reaches the head, which knows the next token.
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


@pytest.fixture(scope="module")
def chain_model() -> MistralForCausalLM:
    return make_chain_model(torch.float32)


def prompt(seed: int, length: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(3, VOCAB_SIZE) for _ in range(length)]


def drafted() -> tuple[float, float]:
    """Return how many tokens were guessed so far, and how many of them were right."""
    return metrics.drafted_tokens_total._value.get(), metrics.drafted_tokens_accepted_total._value.get()


async def answers(engine: Engine, requests: list[Request]) -> list[Any]:
    engine.submit(requests)
    return await events(*requests)


def tokens_of(found: list[Event]) -> list[tuple[int, ...]]:
    return [tuple(token.id for token in event.tokens) for event in found if not isinstance(event, Finished)]


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
    """Return the same requests for the same seed, `lookup` aside."""
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
    """Return the events with their tokens' ids alone: in batches of other shapes, float32 rounds otherwise."""
    return [
        event if isinstance(event, Finished) else (event.text, [(t.id, [id for id, _ in t.top]) for t in event.tokens])
        for event in found
    ]


@both_loops
async def test_random_requests_get_the_same_events_with_and_without_prompt_lookup(
    make_engine: MakeEngine, repeating_model: MistralForCausalLM, overlap: bool
) -> None:
    """Prompts, lengths, guesses, parameters and log-probabilities are random; sequences join and leave."""
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


def looping(num_tokens: int = 30, **changes: Any) -> Request:
    """Return a request whose answer by the chain model repeats two tokens, and that guesses them."""
    fields = GREEDY | LOOKUP | {"eos_token_id": None}
    return request(num_tokens, [9, 3], sampling={"generate": fields} | changes.pop("sampling", {}), **changes)


def texts(found: list[Event]) -> list[str]:
    return [event.text.strip() for event in found if not isinstance(event, Finished)]


def launches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Return a list that gets each step's number of decoding sequences and the lengths of its other ranges."""
    steps: list[tuple[int, list[int]]] = []
    Gate(engine, monkeypatch).fault = lambda decode, prefill: steps.append(
        (len(decode), [len(chunk.token_ids) for chunk in prefill])
    )
    return steps


async def test_a_step_gives_the_right_guesses_and_one_token_more(
    make_engine: MakeEngine, chain_model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(chain_model)
    steps = launches(engine, monkeypatch)
    before = drafted()

    [found] = await answers(engine, [looping(14)])

    assert texts(found) == ["4", "3"] * 7
    # The third token is the first that could be guessed. Then 1 + 3 and 1 + 5 tokens, and what is left: 14 in all.
    assert steps == [(0, [2]), (1, []), (1, []), (0, [4]), (0, [6]), (1, [])]
    assert [after - earlier for after, earlier in zip(drafted(), before, strict=True)] == [8, 8]


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


@both_loops
async def test_a_stop_string_among_right_guesses_ends_the_answer_there(
    make_engine: MakeEngine, chain_model: MistralForCausalLM, overlap: bool
) -> None:
    engine = make_engine(chain_model, overlap=overlap)
    stopped = looping()
    stopped.detokenizers[0] = Stopping(5)

    [found] = await answers(engine, [stopped])

    assert texts(found) == ["4", "3", "4", "3", "4"]
    assert found[-1] == Finished(FinishReason.STOP, prompt_tokens=2, completion_tokens=5)
    assert stopped.num_output_tokens == 5
    await until(lambda: engine.running == 0)
    assert engine.kv_usage == 0


async def test_a_client_that_leaves_while_tokens_are_guessed_frees_the_kv_cache(
    make_engine: MakeEngine, chain_model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(chain_model)
    leaving, staying = looping(200), looping(100)
    gate = Gate(engine, monkeypatch)

    def leave(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        if any(chunk.start > 20 for chunk in prefill):
            leaving.cancel()

    gate.fault = leave
    engine.submit([leaving, staying])

    [found] = await events(staying)

    assert texts(found) == ["4", "3"] * 50
    assert leaving.num_output_tokens < 100
    await until(lambda: engine.running == 0)
    assert engine.kv_usage == 0


@both_loops
async def test_a_step_with_guesses_that_fails_ends_the_sequence_that_breaks_it_alone(
    make_engine: MakeEngine, chain_model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    engine = make_engine(chain_model, overlap=overlap)

    def poison_the_first(decode: Sequence[TokenRange], prefill: Sequence[TokenRange]) -> None:
        if any(chunk.kv_offset == 0 and chunk.start > 5 for chunk in (*decode, *prefill)):
            raise ValueError("poison")

    Gate(engine, monkeypatch).fault = poison_the_first
    sampled = request(20, prompt(1, 9), sampling={"generate": SAMPLED | LOOKUP, "seed": 3})
    failed, neighbour, seeded = await answers(engine, [looping(), looping(), sampled])
    [alone] = await answers(make_engine(chain_model), [request(20, prompt(1, 9), sampling=vars_of(sampled))])

    assert isinstance(failed, InternalError)
    assert texts(neighbour) == ["4", "3"] * 15
    assert seeded == alone


def vars_of(one: Request) -> dict[str, Any]:
    return {"generate": one.sampling.generate, "seed": one.sampling.seed}


async def test_guesses_that_cannot_be_verified_lose_no_token(
    make_engine: MakeEngine, repeating_model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling fails after the first token of every other step with guesses, and changes nothing."""
    sampled = {"generate": SAMPLED | LOOKUP | {"repetition_penalty": 0.5, "eos_token_id": None}, "seed": 3}
    [wanted] = await answers(make_engine(repeating_model), [request(40, sampling=sampled)])
    engine = make_engine(repeating_model)
    sample, forward = batch.sample, engine.runner.forward
    since_forward, num_failed = 0, 0

    def counting(*arguments: Any) -> torch.Tensor:
        nonlocal since_forward
        since_forward = 0
        return forward(*arguments)

    def failing(*arguments: Any) -> Any:
        nonlocal since_forward, num_failed
        since_forward += 1
        if since_forward == 2:
            num_failed += 1
            raise MemoryError
        return sample(*arguments)

    monkeypatch.setattr(engine.runner, "forward", counting)
    monkeypatch.setattr(batch, "sample", failing)
    [found] = await answers(engine, [request(40, sampling=sampled)])

    assert num_failed > 3
    assert found == wanted


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
    """The next turn continues an answer of which many tokens were guessed, some of them wrongly."""
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


async def test_overlap_goes_on_until_a_guess_would_have_been_right(
    make_engine: MakeEngine, chain_model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator, the launches of a text that does not repeat are those without prompt lookup."""

    async def steps_ahead(ids: list[int], fields: dict[str, Any]) -> list[bool]:
        """Return for each launch whether it was launched before the tokens of the last step were read."""
        engine = make_engine(chain_model, overlap=True)
        happened = launches_and_reads(engine, monkeypatch)
        await answers(engine, [request(10, ids, sampling={"generate": fields})])
        return [before != "read" for before, after in itertools.pairwise(happened) if after == "decode"]

    greedy = GREEDY | {"eos_token_id": None}
    assert await steps_ahead([9, 5], greedy | LOOKUP) == await steps_ahead([9, 5], greedy)
    assert True in await steps_ahead([9, 5], greedy | LOOKUP)
    assert False in (await steps_ahead([9, 3], greedy | LOOKUP))[1:]


async def test_in_16_bits_a_request_with_a_seed_guesses_nothing(make_engine: MakeEngine) -> None:
    """Guesses change how a step rounds, and the same seed has to give the same text whatever else runs."""
    engine = make_engine(make_chain_model(torch.bfloat16))
    cold = SAMPLED | LOOKUP | {"temperature": 0.01, "eos_token_id": None}
    counts = [drafted()]
    for seed in (3, None):
        [found] = await answers(engine, [request(20, [9, 3], sampling={"generate": cold, "seed": seed})])
        assert texts(found) == ["4", "3"] * 10
        counts.append(drafted())

    assert counts[0] == counts[1]
    assert counts[1] < counts[2]
