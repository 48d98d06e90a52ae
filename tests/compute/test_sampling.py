"""Sampling: the operations that a batch takes, log-probabilities, and the state after a failure.

`tests/engine/test_oracle.py` compares the tokens with those of `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralForCausalLM

from model_server.compute import sampling
from model_server.compute.logprobs import TokenLogprobs
from model_server.compute.sampling import sample
from model_server.compute.sequence_sampler import SequenceSampler, sequence_sampler
from model_server.errors import BadRequest
from model_server.request import SamplingParams

GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True}


class Operations(TorchDispatchMode):
    """Records the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def samplers_for(model: MistralForCausalLM, *generates: dict[str, Any], **changes: Any) -> list[SequenceSampler]:
    return [
        sequence_sampler(model, [5, 6, 7], SamplingParams(generate=g, max_new_tokens=8, **changes)) for g in generates
    ]


def logits_of(samplers: Sequence[SequenceSampler]) -> torch.Tensor:
    return torch.randn((len(samplers), 300), generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize(
    ("generate", "sorts"),
    [
        (GREEDY, []),
        (SAMPLED | {"top_k": 0}, []),
        (SAMPLED | {"top_k": 0, "temperature": 0.7}, []),
        (SAMPLED | {"top_k": 40, "top_p": 0.9}, ["topk"]),
        (SAMPLED | {"top_k": 0, "top_p": 0.9}, ["sort"]),
        (SAMPLED | {"top_k": 0, "min_p": 0.1}, ["sort"]),
    ],
    ids=str,
)
def test_vocabulary_is_sorted_only_for_a_truncation_that_needs_it(
    model: MistralForCausalLM, generate: dict[str, Any], sorts: list[str]
) -> None:
    samplers = samplers_for(model, generate, generate)

    with Operations() as operations:
        sample(logits_of(samplers), samplers, torch.Generator())

    assert [name for name in operations.names if name in ("topk", "sort")] == sorts


@pytest.mark.parametrize("generate", [SAMPLED | {"top_k": 0}, SAMPLED | {"top_k": 0, "top_p": 0.9}], ids=str)
def test_seed_gives_the_same_tokens_in_every_batch(model: MistralForCausalLM, generate: dict[str, Any]) -> None:
    alone = samplers_for(model, generate, seed=3)
    beside = [*samplers_for(model, SAMPLED, GREEDY), *samplers_for(model, generate, seed=3)]
    logits = logits_of(beside)

    (token,) = sample(logits[-1:], alone, torch.Generator()).read()

    assert sample(logits, beside, torch.Generator()).read()[-1] == token


def test_logits_are_not_changed(model: MistralForCausalLM) -> None:
    """Log-probabilities are computed from the raw logits."""
    samplers = samplers_for(model, GREEDY | {"repetition_penalty": 1.3}, SAMPLED, frequency_penalty=0.5)
    logits = logits_of(samplers)
    before = logits.clone()

    sample(logits, samplers, torch.Generator())

    assert torch.equal(logits, before)


def test_failed_sampling_leaves_the_generators_as_they_were(
    model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine repeats a step after an error, and a seed must then give the same token."""
    expected = sample(logits_of([0, 0]), samplers_for(model, SAMPLED, SAMPLED, seed=3), torch.Generator()).read()
    samplers = samplers_for(model, SAMPLED, SAMPLED, seed=3)
    copy = sampling.AsyncHostCopy

    def out_of_memory(tensor: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampling, "AsyncHostCopy", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        sample(logits_of(samplers), samplers, torch.Generator())
    monkeypatch.setattr(sampling, "AsyncHostCopy", copy)

    assert sample(logits_of(samplers), samplers, torch.Generator()).read() == expected


def test_parameters_that_forbid_every_token_are_an_error_of_their_own_sequence(model: MistralForCausalLM) -> None:
    samplers = samplers_for(model, GREEDY, SAMPLED | {"suppress_tokens": list(range(300))})

    token, error = sample(logits_of(samplers), samplers, torch.Generator()).read()

    assert isinstance(token, int)
    assert isinstance(error, BadRequest)


def test_log_probabilities_of_many_tokens_take_one_softmax() -> None:
    logits = torch.randn((3, 300))
    token_ids = torch.tensor([7, 0, 299])

    with Operations() as operations:
        tokens = TokenLogprobs(logits, token_ids, [0, 5, 2]).read()

    assert operations.names.count("log_softmax") == 1
    assert operations.names.count("topk") == 1
    expected = logits.log_softmax(-1)
    for i, (token, num_top) in enumerate(zip(tokens, [0, 5, 2], strict=True)):
        assert token.id == token_ids[i]
        assert token.logprob == pytest.approx(float(expected[i, token.id]))
        assert [id_ for id_, _ in token.top] == expected[i].topk(num_top).indices.tolist()


def test_log_probabilities_come_with_the_sampled_tokens(model: MistralForCausalLM) -> None:
    """Both batched and unbatched sequences report them, computed from the raw logits."""
    samplers = [
        *samplers_for(model, GREEDY | {"repetition_penalty": 1.3}, logprobs=3),
        *samplers_for(model, SAMPLED),
        *samplers_for(model, GREEDY | {"suppress_tokens": [5]}, logprobs=0),
    ]
    logits = logits_of(samplers)

    sampled = sample(logits, samplers, torch.Generator())

    logprobs, tokens = sampled.read_logprobs(), sampled.read()
    assert {i: len(token.top) for i, token in logprobs.items()} == {0: 3, 2: 0}
    for i, token in logprobs.items():
        assert token.id == tokens[i]
        assert token.logprob == pytest.approx(float(logits[i].log_softmax(-1)[token.id]))


def test_history_has_the_token_before_the_host_reads_it(model: MistralForCausalLM) -> None:
    """A penalty therefore needs no copy to the host, and the next step can be launched immediately."""
    batched, unbatched = samplers_for(model, GREEDY | {"repetition_penalty": 1.3}, GREEDY | {"no_repeat_ngram_size": 2})

    sampled = sample(logits_of([batched, unbatched]), [batched, unbatched], torch.Generator())

    assert [int(s.tokens[0, -1]) for s in (batched, unbatched)] == sampled.read()
