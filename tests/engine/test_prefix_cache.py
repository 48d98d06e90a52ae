"""The prefix cache: it never supplies wrong keys and values, and it saves prefill."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from model_server.compute.cpu.packed_linear import pack
from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.runner import Runner
from model_server.engine.engine import Engine
from model_server.engine.scheduling.prefix_cache import MIN_PREFIX_TOKENS, PrefixCache, common_prefix_length
from model_server.request import Request
from tests.support.contiguous_cache import contiguous_cache
from tests.support.engine_requests import GREEDY, Gate, events, request, until
from tests.support.oracle import SEED, expected, prompt
from tests.support.tiny_model import tiny_mistral

MakeEngine = Callable[..., Engine]
SHARED = prompt(100)


def chat(length: int, shared: Sequence[int] = SHARED) -> list[int]:
    """Return a prompt with the shared prefix and a suffix of this length."""
    return [*shared, *prompt(length)]


def ids(one: Request) -> list[int]:
    return one.detokenizers[0].ids  # type: ignore[attr-defined, no-any-return]


class PrefillCounter:
    """Counts the prompt tokens that an engine computes."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_tokens = 0
        forward = engine.runner.forward

        def counting(
            decode: Sequence[TokenRange], prefill: Sequence[TokenRange], wanted: Sequence[int]
        ) -> torch.Tensor:
            self.num_tokens += sum(len(chunk.token_ids) for chunk in prefill)
            return forward(decode, prefill, wanted)

        monkeypatch.setattr(engine.runner, "forward", counting)


def test_a_match_is_what_the_kv_cache_holds() -> None:
    """Compares two thousand random sequences in a small KV cache with a map from each token to its prefix."""
    numbers = random.Random(0)
    prefix_cache = PrefixCache()
    memory: list[tuple[int, ...]] = [()] * 300
    num_matched = 0
    for _ in range(2000):
        token_ids = [numbers.randint(0, 1) for _ in range(numbers.randint(1, 40))]
        start = numbers.randrange(300 - len(token_ids))
        source, length = prefix_cache.match_prefix(token_ids, start)
        for i in range(length):
            assert memory[source + i] == tuple(token_ids[: i + 1])
        assert source == start or abs(source - start) >= length, "the copy would overwrite its source"
        num_matched += length
        reserved = len(token_ids) + numbers.randint(0, 5)
        prefix_cache.invalidate(start, reserved)
        memory[start : start + reserved] = [()] * len(memory[start : start + reserved])
        written = numbers.randint(0, len(token_ids))
        for i in range(written):
            memory[start + i] = tuple(token_ids[: i + 1])
        prefix_cache.insert(start, token_ids[:written])
    assert num_matched > 4000, "too few matches to test"


def test_common_tokens_are_counted_to_the_first_that_differs() -> None:
    assert common_prefix_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix_length([1, 2], [1, 2, 4]) == 2
    assert common_prefix_length([], [1]) == 0


@pytest.fixture(params=["dense", "contiguous"])
def make(request: pytest.FixtureRequest, make_engine: MakeEngine) -> MakeEngine:
    """A factory of engines over each kind of KV cache."""

    def make(model: Any = None, **changes: Any) -> Engine:
        model = model or request.getfixturevalue("model")
        runner = Runner(model, contiguous_cache(model, num_tokens=900)) if request.param == "contiguous" else None
        return make_engine(model, runner=runner, **changes)

    return make


async def test_a_prompt_with_the_prefix_of_an_earlier_one_computes_only_the_rest(
    plain_model: Any, make: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    prefilled = PrefillCounter(engine, monkeypatch)
    asked = [request(12, chat(9)), request(12, chat(30)), request(12, chat(20))]

    for one in asked:
        engine.submit([one])
        await events(one)

    assert [ids(one) for one in asked] == [expected(plain_model, one.prompt_ids, 12, GREEDY) for one in asked]
    assert [one.num_cached_tokens for one in asked] == [0, 100, 100]
    assert prefilled.num_tokens == 109 + 30 + 20


async def test_the_next_turn_of_a_chat_computes_only_what_is_new(plain_model: Any, make: MakeEngine) -> None:
    """The answer is cached too, except its last token, which was never computed."""
    engine = make()
    first = request(20, prompt(50))
    engine.submit([first])
    await events(first)
    second = request(20, [*prompt(50), *ids(first), *prompt(7)])

    engine.submit([second])
    await events(second)

    assert ids(second) == expected(plain_model, second.prompt_ids, 20, GREEDY)
    assert second.num_cached_tokens == 50 + 19


async def test_conversations_that_take_turns_stay_cached(plain_model: Any, make: MakeEngine) -> None:
    """A short request runs between any two turns, and no two requests overlap."""
    engine = make()
    said = {"one": prompt(60), "other": prompt(70)}
    for turn in range(3):
        for name, known in said.items():
            asked, short = request(6, [*known, *prompt(5)]), request(2, prompt(9))
            for one in (asked, short):
                engine.submit([one])
                await events(one)
            assert ids(asked) == expected(plain_model, asked.prompt_ids, 6, GREEDY)
            assert asked.num_cached_tokens == (len(known) - 1 if turn else 0)
            said[name] = [*asked.prompt_ids, *ids(asked)]


async def test_a_running_sequence_supplies_its_prefix(
    plain_model: Any, make: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    gate = Gate(engine, monkeypatch)
    first, second = request(140, chat(5)), request(10, chat(6))
    engine.submit([first])
    await until(lambda: first.num_output_tokens > 2)
    gate.open.clear()
    engine.submit([second])
    assert engine.running == 1, "the first sequence has finished before the second was submitted"
    gate.open.set()
    await events(first, second)

    assert second.num_cached_tokens == 100
    assert [ids(first), ids(second)] == [
        expected(plain_model, chat(5), 140, GREEDY),
        expected(plain_model, chat(6), 10, GREEDY),
    ]


async def test_requests_that_arrive_together_share_the_prefix_that_the_first_computes(
    plain_model: Any, make: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other requests wait for the first. An ingress that has held requests back delivers them together."""
    engine = make()
    prefilled = PrefillCounter(engine, monkeypatch)
    asked = [request(8, chat(length)) for length in (5, 6, 7, 8, 9, 10)]

    engine.submit(asked)
    await events(*asked)

    assert [ids(one) for one in asked] == [expected(plain_model, one.prompt_ids, 8, GREEDY) for one in asked]
    half_a_step = 16
    assert 100 + 45 <= prefilled.num_tokens <= 100 + 45 + 5 * half_a_step


async def test_a_sequence_that_waits_for_a_prefix_goes_on_when_the_other_is_cancelled(
    plain_model: Any, make: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    gate = Gate(engine, monkeypatch)
    gate.open.clear()
    first, second = request(8, chat(5)), request(8, chat(6))
    engine.submit([first, second])
    await until(lambda: engine.running == 2)
    first.cancel()
    gate.open.set()
    await events(second)

    assert ids(second) == expected(plain_model, chat(6), 8, GREEDY)


async def test_seeded_requests_and_prompt_log_probabilities_bypass_the_prefix_cache(make: MakeEngine) -> None:
    engine = make()
    asked = [
        request(4, chat(5)),
        request(4, chat(5), sampling={"seed": SEED}),
        request(4, chat(5), sampling={"logprobs": 0, "prompt_logprobs": True}),
        request(4, chat(5)),
    ]
    for one in asked:
        engine.submit([one])
        await events(one)

    assert [one.num_cached_tokens for one in asked] == [0, 0, 0, 104]


async def test_a_prefix_below_the_minimum_is_not_reused(make: MakeEngine) -> None:
    engine = make()
    for length, wanted in ((MIN_PREFIX_TOKENS - 1, 0), (MIN_PREFIX_TOKENS, MIN_PREFIX_TOKENS)):
        start = prompt(200)[:length] if wanted else prompt(199)[:length]
        asked = [request(2, [*start, 7, 8]), request(2, [*start, 9, 8])]
        for one in asked:
            engine.submit([one])
            await events(one)
        assert asked[1].num_cached_tokens == wanted


async def test_nothing_is_reused_without_prefix_caching(make: MakeEngine) -> None:
    engine = make(prefix_caching=False)
    asked = [request(4, chat(5)), request(4, chat(5))]
    for one in asked:
        engine.submit([one])
        await events(one)

    assert [one.num_cached_tokens for one in asked] == [0, 0]


async def test_random_prompts_with_common_prefixes_in_a_full_kv_cache_equal_generate(
    plain_model: Any,
    make_contiguous_engine: MakeEngine,
) -> None:
    """Sequences reuse and overwrite each other's keys, join and leave early, in a KV cache that holds only a few."""
    engine = make_contiguous_engine(tiny_packed(), max_batch_size=6)
    numbers = random.Random(3)
    roots = [prompt(length) for length in (40, 70, 90)]
    asked = []
    for _ in range(60):
        root = numbers.choice(roots)
        token_ids = [*root[: numbers.randint(20, len(root))], *prompt(numbers.randint(1, 30))]
        asked.append(request(numbers.randint(1, 16), token_ids))
    leaving = [request(100, chat(1, numbers.choice(roots))) for _ in range(15)]

    async def leave(one: Request) -> None:
        engine.submit([one])
        async for _ in one.answer():
            break

    for batch in range(15):
        together = asked[4 * batch : 4 * batch + 4]
        engine.submit(together)
        await asyncio.gather(events(*together), leave(leaving[batch]))

    for one in asked:
        assert ids(one) == expected(plain_model, one.prompt_ids, one.sampling.max_new_tokens, GREEDY)
    assert sum(one.num_cached_tokens for one in asked) > 1000
    assert engine.kv_usage == 0


@pytest.mark.parametrize("changes", [{"sliding_window": 13}], ids=str)
async def test_a_model_with_a_sliding_window_reuses_prefixes(make: MakeEngine, changes: dict[str, Any]) -> None:
    asked = [request(12, chat(5)), request(12, chat(6))]
    wanted = [expected(tiny_mistral(**changes), one.prompt_ids, 12, GREEDY) for one in asked]
    engine = make(tiny_packed(**changes))
    for one in asked:
        engine.submit([one])
        await events(one)

    assert [ids(one) for one in asked] == wanted
    assert asked[1].num_cached_tokens == 100


def tiny_packed(**changes: Any) -> Any:
    model = tiny_mistral(**changes)
    fuse(model)
    pack(model)
    return model
