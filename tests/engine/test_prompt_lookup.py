"""Prompt lookup: the drafted tokens, and how the sequences of a step share the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from model_server.engine.prompt_lookup import PromptLookup, find_source
from model_server.engine.scheduling.drafts import plan_drafts
from model_server.engine.sequence import Sequence as EngineSequence
from model_server.request import Request, SamplingParams

ids_of_few = st.lists(st.integers(3, 6), min_size=1, max_size=40)


def lookup_in(prompt: Sequence[int], num_tokens: int = 4, **changes: Any) -> PromptLookup:
    return PromptLookup(prompt, max_new_tokens=50, num_tokens=num_tokens, **changes)


@given(ids=ids_of_few, num_tokens=st.integers(1, 12), ngram_size=st.integers(1, 6))
def test_the_source_of_guesses_is_the_one_that_generate_finds(ids: list[int], num_tokens: int, ngram_size: int) -> None:
    of_generate = PromptLookupCandidateGenerator(
        num_output_tokens=num_tokens, max_matching_ngram_size=ngram_size, max_length=1000
    )
    candidates, _ = of_generate.get_candidates(torch.tensor([ids]))

    source = find_source(np.array(ids), ngram_size)

    guessed = [] if source is None else ids[source : source + num_tokens]
    assert guessed == candidates[0, len(ids) :].tolist()


def test_nothing_is_guessed_before_a_guess_would_have_been_right() -> None:
    lookup = lookup_in([3, 4, 5, 6, 7, 8, 3])
    assert lookup.draft(10) == []

    lookup.append(4)

    assert lookup.draft(10) == [5, 6, 7]


def test_more_is_guessed_the_more_was_right_up_to_the_requests_number() -> None:
    lookup = lookup_in([*range(3, 30), 3], num_tokens=8)
    lengths = []
    for token_id in (4, 5, 6, 7):
        lookup.append(token_id)
        lengths.append(len(lookup.draft(100)))

    assert lengths == [3, 6, 8, 8]


def test_a_wrong_guess_ends_the_guesses_until_one_is_right_again() -> None:
    lookup = lookup_in([3, 4, 5, 6, 7, 8, 3])
    drafts = []
    for token_id in (4, 9, 5, 6):
        lookup.append(token_id)
        drafts.append(lookup.draft(2))

    assert drafts == [[5, 6], [], [], [7, 8]]


def test_a_source_is_kept_while_its_guesses_are_right() -> None:
    """The earliest occurrence of the last two tokens is not the source."""
    lookup = lookup_in([5, 6, 12, 3, 4, 5, 6, 7, 8, 3])
    for token_id in (4, 5, 6):
        lookup.append(token_id)

    assert lookup.draft(2) == [7, 8]


def test_a_loop_is_guessed_beyond_the_end_of_the_text() -> None:
    lookup = lookup_in([9, 3, 4, 3, 4], num_tokens=5)
    lookup.append(3)
    lookup.append(4)

    assert lookup.draft(10) == [3, 4, 3, 4, 3]


def test_no_token_is_guessed_from_an_end_of_sequence_token_on() -> None:
    lookup = lookup_in([3, 4, 5, 2, 6, 3], eos_token_ids={2})
    lookup.append(4)

    assert lookup.draft(10) == [5]


def confident(text: Sequence[int] = (3, 4, 5, 6, 7, 8, 9, 3), max_new_tokens: int = 20) -> EngineSequence:
    """Return a decoding sequence whose last guess was right."""
    sequence = EngineSequence(Request(list(text), SamplingParams({}, max_new_tokens), []), 0, started_s=0.0)
    sequence.lookup = lookup_in(text, num_tokens=9)
    sequence.advance_prefill(len(text))
    sequence.append(4)
    sequence.append(5)
    sequence.append(6)
    return sequence


def drafted_lengths(decoding: list[EngineSequence], max_tokens: int) -> list[int]:
    return [len(d.token_ids) for d in plan_drafts(decoding, device_type="cpu", max_tokens=max_tokens)]


def test_the_guesses_of_a_step_are_shared_equally() -> None:
    assert drafted_lengths([confident() for _ in range(3)], max_tokens=10) == [3, 3, 3]
    assert drafted_lengths([confident() for _ in range(3)], max_tokens=2) == []
    assert drafted_lengths([confident()], max_tokens=-5) == []
    assert drafted_lengths([confident() for _ in range(40)], max_tokens=1000) == []


def test_a_draft_leaves_room_for_the_token_after_it() -> None:
    """The KV cache reserves only `max_new_tokens` tokens after the prompt."""
    sequence = confident(max_new_tokens=6)
    [draft] = plan_drafts([sequence], device_type="cpu", max_tokens=100)

    assert list(draft.token_ids) == [7, 8]
    assert draft.token_range.kv_len < sequence.request.max_tokens
