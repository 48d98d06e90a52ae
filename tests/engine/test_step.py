"""A step's plan, and the isolation of the sequence that makes a step fail."""

from __future__ import annotations

import pytest
import torch

from model_server.engine.fault_isolation import isolate_faults
from model_server.engine.sequence import Sequence, SequenceStatus
from model_server.engine.step import Batch, Draft, PrefillChunk
from model_server.request import Request, SamplingParams


def make_sequence(num_prompt_tokens: int = 4, prompt_logprobs: bool = False) -> Sequence:
    sampling = SamplingParams({}, 8, prompt_logprobs=prompt_logprobs)
    return Sequence(Request([1] * num_prompt_tokens, sampling, []), kv_offset=0, started_s=0.0)


def test_a_sequence_waits_prefills_and_decodes() -> None:
    sequence = make_sequence(10)
    statuses = [sequence.status]
    sequence.start_prefill(num_cached_tokens=4)
    statuses.append(sequence.status)
    sequence.advance_prefill(5)
    statuses.append(sequence.status)
    sequence.advance_prefill(1)
    statuses.append(sequence.status)

    waiting, prefilling, decoding, _ = SequenceStatus
    assert statuses == [waiting, prefilling, prefilling, decoding]
    assert sequence.request.num_cached_tokens == 4


def test_logits_are_computed_for_sampled_tokens_then_for_prompts_with_log_probabilities() -> None:
    decoding, whole, part = make_sequence(), make_sequence(3, prompt_logprobs=True), make_sequence(9)
    batch = Batch([decoding], [PrefillChunk(whole, 0, 3, True), PrefillChunk(part, 0, 2, False)])

    assert batch.sampled == [decoding, whole]
    assert batch.logit_indices == [0, 3, 1, 2, 3]


def test_the_logits_of_guessed_tokens_come_last() -> None:
    decoding, drafting, whole = make_sequence(), make_sequence(), make_sequence(3, prompt_logprobs=True)
    batch = Batch([decoding], [PrefillChunk(whole, 0, 3, True)], [Draft(drafting, [5, 6])])

    assert batch.sampled == [decoding, drafting, whole]
    assert batch.logit_indices == [0, 1, 6, 4, 5, 6, 2, 3]
    assert batch.num_drafted == 2


def test_a_draft_is_computed_behind_the_latest_token() -> None:
    sequence = make_sequence(4)
    sequence.append(7)
    sequence.append(8)

    token_range = Draft(sequence, [5, 6]).token_range

    assert (token_range.start, token_range.token_ids, token_range.kv_len) == (5, [8, 5, 6], 8)


@pytest.mark.parametrize(
    ("num_decode", "num_prefill", "num_drafts"),
    [(2, 0, 0), (0, 2, 0), (3, 1, 0), (1, 4, 0), (5, 2, 0), (0, 0, 3), (2, 1, 5), (5, 0, 1), (1, 1, 1)],
)
def test_the_halves_of_a_batch_are_the_batch(num_decode: int, num_prefill: int, num_drafts: int) -> None:
    batch = Batch(
        [make_sequence() for _ in range(num_decode)],
        [PrefillChunk(make_sequence(), 0, 4, True) for _ in range(num_prefill)],
        [Draft(make_sequence(), [5]) for _ in range(num_drafts)],
    )

    first, second = batch.halves()

    assert [*first.decode, *second.decode] == batch.decode
    assert [*first.prefill, *second.prefill] == batch.prefill
    assert [*first.drafts, *second.drafts] == batch.drafts
    assert abs(len(first) - len(second)) <= 1


def isolated(batch: Batch, poison: Sequence, error: Exception) -> tuple[list[Sequence], list[Sequence]]:
    """Return the sequences that were computed and those that failed."""
    failed: list[Sequence] = []

    def compute(part: Batch) -> None:
        if poison in part.sequences:
            raise error

    computed = [s for part, _ in isolate_faults(batch, compute, failed.append) for s in part.sequences]
    return computed, failed


def test_only_the_sequence_that_makes_a_step_fail_fails() -> None:
    decode = [make_sequence() for _ in range(5)]
    poison = make_sequence()

    computed, failed = isolated(Batch(decode, [PrefillChunk(poison, 0, 4, True)]), poison, ValueError("poison"))

    assert (computed, failed) == (decode, [poison])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), MemoryError(), torch.AcceleratorError()], ids=lambda error: type(error).__name__
)
def test_out_of_memory_and_a_broken_accelerator_are_no_sequences_fault(error: Exception) -> None:
    sequences = [make_sequence() for _ in range(2)]

    with pytest.raises(type(error)):
        isolated(Batch(sequences), sequences[0], error)
