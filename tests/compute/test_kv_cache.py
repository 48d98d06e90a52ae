"""The KV cache under an engine: requests wait for memory, and answers equal `generate` in every layout."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from transformers import MistralForCausalLM

from model_server.compute.cpu.packed_linear import pack
from model_server.compute.fused_linear import fuse
from model_server.compute.runner import Runner
from model_server.engine.engine import Engine
from model_server.errors import BadRequest, QueueFull
from model_server.telemetry.metrics import drafted_tokens_accepted_total
from tests.support.contiguous_cache import contiguous_cache
from tests.support.engine_requests import Gate, events, request, until
from tests.support.oracle import BATCHED, FALLBACK, GREEDY, answer, expected, prompt
from tests.support.tiny_model import tiny_mistral

MakeEngine = Callable[..., Engine]


def test_allocatable_sequences_are_counted_as_they_would_be_allocated(model: MistralForCausalLM) -> None:
    cache = contiguous_cache(model, num_tokens=100)
    first, _, third = (cache.allocate(30) for _ in range(3))
    assert (first, third) == (0, 60)
    cache.free(0)

    assert cache.num_allocatable([20, 10, 10]) == 3
    assert cache.num_allocatable([35, 1]) == 0
    assert cache.allocate(35) is None
    assert cache.allocate(30) == 0


async def test_answers_equal_generate(plain_model: Any, model: Any, make_contiguous_engine: MakeEngine) -> None:
    """Sequences of every kind join and leave the batch; the cache never holds all of them at once."""
    engine = make_contiguous_engine(model, max_batch_size=6)
    jobs = [(prompt(3 + 17 * (i % 10)), 8 + 3 * (i % 5), fields) for i, fields in enumerate([*BATCHED, FALLBACK[0]])]

    answers = await asyncio.gather(*(answer(engine, *job) for job in jobs))

    assert [ids for ids, _ in answers] == [expected(plain_model, *job) for job in jobs]
    assert (engine.running, engine.waiting, engine.kv_usage) == (0, 0, 0)
    assert engine.runner.kv_cache.num_allocatable([engine.runner.kv_cache.num_tokens]) == 1


@pytest.mark.parametrize("changes", [{"sliding_window": 13}, {"head_dim": 32}, {"num_key_value_heads": 4}], ids=str)
async def test_every_model_shape_equals_generate(make_contiguous_engine: MakeEngine, changes: dict[str, Any]) -> None:
    model = tiny_mistral(**changes)
    jobs = [(prompt(n), 30, GREEDY) for n in (2, 20, 90)]
    wanted = [expected(model, *job) for job in jobs]
    fuse(model)
    pack(model)

    engine = make_contiguous_engine(model)

    answers = await asyncio.gather(*(answer(engine, *job) for job in jobs))

    assert [ids for ids, _ in answers] == wanted


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 13}], ids=str)
async def test_answers_with_guessed_tokens_equal_generate(
    make_contiguous_engine: MakeEngine, changes: dict[str, Any]
) -> None:
    """A model with few tokens repeats itself; drafts are ranges of several tokens in a step with decoding sequences."""
    model = tiny_mistral(vocab_size=16, **changes)
    jobs = [([3 + i * n % 13 for i in range(n)], 40, GREEDY | {"eos_token_id": None}) for n in (2, 20, 60)]
    wanted = [expected(model, *job) for job in jobs]
    fuse(model)
    pack(model)
    engine = make_contiguous_engine(model)
    before = drafted_tokens_accepted_total._value.get()

    answers = await asyncio.gather(
        *(answer(engine, ids, n, fields | {"prompt_lookup_num_tokens": 5}) for ids, n, fields in jobs)
    )

    assert drafted_tokens_accepted_total._value.get() > before
    assert [ids for ids, _ in answers] == wanted


async def test_request_without_memory_waits_and_is_not_overtaken(
    make_engine: MakeEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, runner=Runner(model, contiguous_cache(model, num_tokens=100)), max_batch_size=4)
    gate = Gate(engine, monkeypatch)
    gate.open.clear()
    sequences_of_steps: list[int] = []
    gate.fault = lambda decode, prefill: sequences_of_steps.append(len(decode) + len(prefill))
    first, large, small = request(57), request(77), request(7)
    engine.submit([first])
    await until(lambda: engine.running == 1)
    engine.submit([large])
    engine.submit([small])

    assert (engine.running, engine.waiting) == (1, 2)
    assert engine.kv_usage == pytest.approx(0.6)
    gate.open.set()
    await events(first, large, small)
    # 40 tokens stay free and `small` needs 10; it is still admitted only together with `large`.
    assert sequences_of_steps == [1] * 57 + [2] * 7 + [1] * 70
    assert engine.kv_usage == 0


async def test_request_that_waits_for_memory_counts_towards_the_queue(
    make_engine: MakeEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(
        model, runner=Runner(model, contiguous_cache(model, num_tokens=100)), max_batch_size=4, max_queue_size=1
    )
    gate = Gate(engine, monkeypatch)
    gate.open.clear()
    one, two = request(57), request(77)
    engine.submit([one])
    engine.submit([two])

    with pytest.raises(QueueFull):
        engine.submit([request(77)])
    with pytest.raises(BadRequest, match="this server holds 256"):
        engine.submit([request(300)])
    gate.open.set()
    await events(one, two)
