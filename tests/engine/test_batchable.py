"""The requests that can be batched, which must match the API's table of parameters."""

from __future__ import annotations

from typing import Any

import pytest

from model_server.api.v1.parameters import GenerateParameters, about
from model_server.engine.unbatched.batchable import can_batch
from model_server.request import SamplingParams

DOCUMENTED = {name: note.batched for name, note in about(GenerateParameters).items()}
UNBATCHED: dict[str, Any] = {
    "num_beams": 2,
    "guidance_scale": 1.5,
    "negative_prompt_ids": [5],
    "token_healing": True,
    "use_cache": False,
    "watermarking_config": {"seeding_scheme": "selfhash"},
}
BATCHED: dict[str, Any] = {
    "num_beams": 1,
    "guidance_scale": 1,
    "token_healing": False,
    "use_cache": True,
    "watermarking_config": {},
    "repetition_penalty": 1.2,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 3,
}


@pytest.mark.parametrize(("name", "value"), UNBATCHED.items())
def test_a_value_that_needs_generate_is_not_batched(name: str, value: object) -> None:
    assert not can_batch(SamplingParams({name: value}, 8))


@pytest.mark.parametrize(("name", "value"), BATCHED.items())
def test_every_other_value_is_batched(name: str, value: object) -> None:
    assert can_batch(SamplingParams({name: value}, 8))
    assert can_batch(SamplingParams({name: None}, 8))


def test_several_beams_of_one_call_are_not_batched() -> None:
    assert not can_batch(SamplingParams({}, 8, num_choices=2))


def test_the_table_marks_the_parameters_that_can_prevent_batching() -> None:
    assert {name for name, batched in DOCUMENTED.items() if batched != "yes"} == set(UNBATCHED)


def test_the_table_says_no_where_no_value_is_batched() -> None:
    assert {name for name in UNBATCHED if DOCUMENTED[name] == "no"} == set(UNBATCHED) - set(BATCHED)
