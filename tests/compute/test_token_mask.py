"""Token masks: forbidden tokens are never sampled, and the logits of other sequences are bit-for-bit unchanged."""

from __future__ import annotations

import ctypes
from collections.abc import Collection

import pytest
import torch

from model_server.compute.sampling import sample
from model_server.compute.sequence_sampler import sequence_sampler
from model_server.compute.token_mask import TokenMask, TokenMaskFiller, only_allowed
from model_server.errors import GrammarTooComplex, InternalError
from model_server.request import SamplingParams
from tests.support.fakes import OnlyTokens
from tests.support.tiny_model import VOCAB_SIZE

CPU = torch.device("cpu")
INF = torch.inf


def filled(*matchers: OnlyTokens | None) -> TokenMask:
    filler = TokenMaskFiller(VOCAB_SIZE, CPU)
    constrained = {i: matcher for i, matcher in enumerate(matchers) if matcher is not None}
    mask = filler.join(dict(zip(constrained, filler.start([*constrained.values()]), strict=True)))
    assert mask is not None
    return mask


def mask_of(*allowed: Collection[int] | None) -> TokenMask:
    return filled(*(None if tokens is None else OnlyTokens(tokens) for tokens in allowed))


def test_a_mask_has_the_tokens_that_each_matcher_allows():
    mask = mask_of({0, 31, 32, VOCAB_SIZE - 1}, None, {7})

    assert mask.indices == [0, 2]
    left = mask.apply(torch.zeros(3, VOCAB_SIZE)).isfinite()
    assert [left[i].nonzero().flatten().tolist() for i in (0, 2)] == [[0, 31, 32, VOCAB_SIZE - 1], [7]]
    assert left[1].all()


def test_a_step_without_masks_is_sampled_without_one():
    assert TokenMaskFiller(VOCAB_SIZE, CPU).join({}) is None


def test_logits_of_other_sequences_are_equal_bit_for_bit_and_the_originals_are_kept():
    logits = torch.randn(3, VOCAB_SIZE)
    before = logits.clone()

    masked = mask_of(None, {5}, None).apply(logits)

    assert torch.equal(masked[[0, 2]], before[[0, 2]])
    assert masked[1].isfinite().nonzero().flatten().tolist() == [5]
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("error", "expected"), [(GrammarTooComplex("too complex"), GrammarTooComplex), (ValueError(), InternalError)]
)
def test_a_matcher_that_fails_gives_an_error_to_its_sequence_alone(plain_model, error, expected):
    mask = filled(OnlyTokens({5}), OnlyTokens({6}, fill_error=error), None)
    assert mask.apply(torch.zeros(3, VOCAB_SIZE))[1].isfinite().all(), "it would have no token to sample"
    sampler = sequence_sampler(plain_model, [1], SamplingParams({"do_sample": False}, max_new_tokens=1))
    logits = torch.randn(3, VOCAB_SIZE)

    first, failed, free = sample(logits, [sampler] * 3, torch.Generator(), mask).read()

    assert (first, free) == (5, int(logits[2].argmax()))
    assert isinstance(failed, expected)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, -INF]),
        ([-INF, -INF, 3.0], [0.5, 0.5, -INF]),
        ([-INF, torch.nan, 3.0], [0.5, 0.5, -INF]),
        ([torch.nan, 2.0, -INF], [-INF, 2.0, -INF]),
    ],
    ids=["resurrected", "none left", "none left but NaN", "one left"],
)
def test_the_grammar_wins_over_what_processors_made_of_the_logits(scores, expected):
    masked_logits = torch.tensor([[0.5, 0.5, -INF]])

    assert only_allowed(torch.tensor([scores]), masked_logits).tolist() == [expected]


def test_a_mask_is_little_endian_words_of_32_tokens():
    memory = (ctypes.c_uint32 * 2)()
    OnlyTokens.fill_all([OnlyTokens({0, 33})], ctypes.addressof(memory), 8)

    assert list(memory) == [1, 2]
