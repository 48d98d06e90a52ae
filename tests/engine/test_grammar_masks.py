"""Late masks: steps leave out a sequence with a late mask, the other sequences continue, and no token changes."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Sized

import pytest
import torch
from transformers import MistralForCausalLM

from model_server.compute.token_mask import TokenMaskFiller
from model_server.engine import grammar_masks
from model_server.engine.grammar_masks import GrammarMasks
from model_server.engine.sequence import Sequence
from model_server.engine.step import Batch
from model_server.errors import GrammarTooComplex, InternalError, ServeError
from model_server.request import Request
from tests.engine.test_constrained import same_answers
from tests.support.engine_requests import GREEDY, Gate, MakeEngine, events, request, until
from tests.support.fakes import OnlyTokens
from tests.support.prompt_lookup import LOOKUP, drafted
from tests.support.tiny_model import VOCAB_SIZE

ALL_TOKENS = range(VOCAB_SIZE)
both_loops = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])


class HeldMasks(OnlyTokens):
    """A matcher that allows every token. After some tokens, it fills its mask only once `go_on` is set."""

    def __init__(self, allowed: range, after: int = 3, fill_error: Exception | None = None) -> None:
        super().__init__(allowed)
        self.after, self.error = after, fill_error
        self.held, self.go_on = threading.Event(), threading.Event()

    @property
    def first_mask(self) -> bytes | None:
        return None if self.accepted else b"\xff" * ((len(self.allowed) + 31) // 32 * 4)

    @staticmethod
    def fill_all(matchers: Sized[OnlyTokens], address: int, num_bytes: int) -> dict[int, ServeError]:
        for matcher in matchers:
            if isinstance(matcher, HeldMasks) and len(matcher.accepted) == matcher.after:
                matcher.held.set()
                matcher.go_on.wait(60)
                matcher._fill_error = matcher.error
        return OnlyTokens.fill_all(matchers, address, num_bytes)


@pytest.fixture
def held() -> Iterator[HeldMasks]:
    """A `HeldMasks`; the fixture sets `go_on` at the end, so that no thread keeps waiting."""
    matcher = HeldMasks(ALL_TOKENS)
    yield matcher
    matcher.go_on.set()


@both_loops
async def test_others_end_while_a_mask_is_late(
    make_engine: MakeEngine, held: HeldMasks, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out: list[Collection[Sequence]] = []
    without = Batch.without

    def counted(batch: Batch, late: Collection[Sequence], logits: torch.Tensor) -> tuple[Batch, torch.Tensor]:
        if held.held.is_set():  # on a busy machine a mask may be late before
            left_out.append(late)
        return without(batch, late, logits)

    monkeypatch.setattr(Batch, "without", counted)
    engine = make_engine(overlap=overlap)
    late, others = request(12, matcher=held), [request(12), request(12, prompt=(8, 9))]
    engine.submit([late, *others])

    free = await events(*others)

    assert held.held.is_set()
    assert len(held.accepted) == held.after
    assert len(left_out) <= 1  # the steps after the first late one are planned without the sequence
    held.go_on.set()
    assert await events(late) == free[:1]


@both_loops
async def test_every_kind_of_request_gets_the_same_tokens_after_a_late_mask(
    make_engine: MakeEngine, overlap: bool
) -> None:
    """No penalty, random number, draft or logits processor takes effect in a step that leaves the sequence out."""
    engine = make_engine(overlap=overlap, max_batch_size=len(same_answers()) + 1)
    free = []
    for one in same_answers():
        one.matcher = OnlyTokens(ALL_TOKENS)
        engine.submit([one])
        free += await events(one)
    late = same_answers()
    for one in late:
        one.matcher = HeldMasks(ALL_TOKENS)
    beside = request(40)
    engine.submit([*late, beside])

    await events(beside)
    for one in late:
        assert isinstance(one.matcher, HeldMasks)
        one.matcher.go_on.set()

    assert await events(*late) == free


async def test_log_probabilities_are_the_same_after_a_late_mask(make_engine: MakeEngine, held: HeldMasks) -> None:
    engine = make_engine()
    sampling = {"logprobs": 2}
    free, late, beside = request(8, sampling=sampling), request(8, sampling=sampling, matcher=held), request(20)
    engine.submit([free])
    expected = await events(free)
    engine.submit([late, beside])
    await events(beside)
    held.go_on.set()

    assert await events(late) == expected


@both_loops
async def test_guesses_stop_at_a_late_mask_and_change_no_token(
    make_engine: MakeEngine, repeating_model: MistralForCausalLM, overlap: bool
) -> None:
    engine = make_engine(repeating_model, overlap=overlap)

    def guessed(matcher: OnlyTokens) -> Request:
        return request(40, prompt=[5, 6, 7] * 6, sampling={"generate": GREEDY | LOOKUP}, matcher=matcher)

    free = guessed(OnlyTokens(range(16)))
    right = drafted()[1]
    engine.submit([free])
    expected = await events(free)
    assert drafted()[1] > right
    for after in range(1, 20):
        late, beside = guessed(HeldMasks(range(16), after)), request(6, prompt=[4, 5])
        engine.submit([late, beside])
        await events(beside)
        late.matcher.go_on.set()

        assert await events(late) == expected


@both_loops
@pytest.mark.parametrize("error", [GrammarTooComplex("too complex"), ValueError()], ids=["known", "unknown"])
async def test_a_late_mask_that_fails_ends_its_sequence_alone(
    make_engine: MakeEngine, error: Exception, overlap: bool
) -> None:
    engine = make_engine(overlap=overlap)
    held = HeldMasks(ALL_TOKENS, fill_error=error)
    late, other = request(12, matcher=held), request(12)
    engine.submit([late, other])
    await events(other)
    held.go_on.set()

    [failed] = await events(late)

    assert isinstance(failed, GrammarTooComplex if isinstance(error, ServeError) else InternalError)
    await until(lambda: (engine.dead, engine.running, engine.kv_usage) == (None, 0, 0))


@both_loops
async def test_a_sequence_is_cancelled_while_its_mask_is_late(
    make_engine: MakeEngine, held: HeldMasks, overlap: bool
) -> None:
    engine = make_engine(overlap=overlap)
    late = request(12, matcher=held)
    engine.submit([late])
    await until(held.held.is_set)

    late.cancel()

    await until(lambda: (engine.running, engine.kv_usage) == (0, 0))
    assert not held.go_on.is_set()


@both_loops
async def test_a_request_is_served_while_every_other_sequence_sits_out(
    make_engine: MakeEngine, held: HeldMasks, overlap: bool
) -> None:
    engine = make_engine(overlap=overlap)
    engine.submit([request(12, matcher=held)])
    await until(held.held.is_set)
    later = request(5)
    engine.submit([later])

    [answer] = await events(later)

    assert isinstance(answer, list)


async def test_a_sequence_with_a_late_mask_survives_steps_that_fail(
    make_engine: MakeEngine, held: HeldMasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    gate = Gate(engine, monkeypatch)
    late, failing = request(12, matcher=held), request(60)
    engine.submit([late, failing])
    await until(held.held.is_set)

    def run_out_of_memory(decode: object, prefill: object) -> None:
        raise MemoryError

    gate.fault = run_out_of_memory
    [error] = await events(failing)
    assert isinstance(error, ServeError)
    gate.fault = lambda decode, prefill: None
    held.go_on.set()

    [answer] = await events(late)
    free = request(12)
    engine.submit([free])
    assert [answer] == await events(free)


def test_the_masks_of_others_do_not_wait_for_a_slow_one(held: HeldMasks) -> None:
    held.after = 1
    held.accepted.append(5)  # the mask of its first token is known
    masks = GrammarMasks(TokenMaskFiller(VOCAB_SIZE, torch.device("cpu")))
    slow, other = FakeSequence(held, mask_is_slow=True), FakeSequence(OnlyTokens({5}))

    masks.start([slow, other])

    assert masks.of([other]) is not None
    assert not slow.mask.done


def test_a_late_sequence_joins_the_others_again_once_its_mask_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    filler = TokenMaskFiller(VOCAB_SIZE, torch.device("cpu"))
    masks = GrammarMasks(filler)
    sequence = FakeSequence(OnlyTokens({5}), mask_is_slow=True)

    masks.start([sequence])
    masks.of([sequence])
    assert not sequence.mask_is_slow

    monkeypatch.setattr(grammar_masks, "SLOW_MASK_S", -1.0)
    sequence.mask, sequence.mask_is_slow = None, True
    masks.start([sequence])
    masks.of([sequence])
    assert sequence.mask_is_slow


@pytest.mark.parametrize("matcher", [None, OnlyTokens({1}, active=False)], ids=["free", "asleep"])
def test_a_sequence_that_may_take_every_token_has_no_mask(matcher: OnlyTokens | None) -> None:
    masks = GrammarMasks(TokenMaskFiller(VOCAB_SIZE, torch.device("cpu")))
    sequence = FakeSequence(matcher)

    masks.start([sequence])

    assert sequence.mask is None
    assert masks.of([sequence]) is None


class FakeSequence:
    """The attributes of a sequence that `GrammarMasks` reads."""

    finished = False
    mask = None

    def __init__(self, matcher: OnlyTokens | None, mask_is_slow: bool = False) -> None:
        self.request = request(1, matcher=matcher)
        self.mask_is_slow = mask_is_slow
