"""Steps that verify drafts: their tokens, their finish reasons and their failures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import MistralForCausalLM

from model_server.compute.kv_cache.base import TokenRange
from model_server.engine import batch
from model_server.engine.engine import Engine
from model_server.errors import InternalError
from model_server.request import Finished, FinishReason, Request
from tests.support.engine_requests import Gate, MakeEngine, answers, events, launches_and_reads, request, until
from tests.support.fakes import Stopping
from tests.support.oracle import GREEDY, SAMPLED
from tests.support.prompt_lookup import (
    LOOKUP,
    both_loops,
    drafted,
    looping,
    prompt,
    texts,
)


def launches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Return a list to which each step adds its number of decoding sequences and the lengths of its other ranges."""
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
    # The third token is the first possible guess. Then come 1 + 3 tokens, 1 + 5 tokens and the rest: 14 in all.
    assert steps == [(0, [2]), (1, []), (1, []), (0, [4]), (0, [6]), (1, [])]
    assert [after - earlier for after, earlier in zip(drafted(), before, strict=True)] == [8, 8]


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
    """Sampling fails after the first token of every other step with drafts, and the answer does not change."""
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


async def test_overlap_goes_on_until_a_guess_would_have_been_right(
    make_engine: MakeEngine, chain_model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator, a text that does not repeat has the same launches as without prompt lookup."""

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
