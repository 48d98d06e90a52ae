"""The oracle: `model.generate` on the same weights, and the parameters for which tests compare it with the engine."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import MistralForCausalLM

from model_server.engine.engine import Engine
from model_server.request import Finished, Request, SamplingParams
from tests.support.fakes import TokenIds
from tests.support.tiny_model import VOCAB_SIZE

SEED = 7
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8}
BATCHED = [
    GREEDY,
    GREEDY | {"repetition_penalty": 1.3},
    GREEDY | {"encoder_repetition_penalty": 1.4},
    GREEDY | {"no_repeat_ngram_size": 2},
    GREEDY | {"encoder_no_repeat_ngram_size": 2},
    GREEDY | {"min_new_tokens": 10},
    GREEDY | {"min_length": 60},
    GREEDY | {"bad_words_ids": [[5], [6, 7]]},
    GREEDY | {"suppress_tokens": list(range(20, 200))},
    GREEDY | {"begin_suppress_tokens": list(range(3, 100))},
    GREEDY | {"forced_eos_token_id": 2},
    GREEDY | {"forced_bos_token_id": 9},
    GREEDY | {"exponential_decay_length_penalty": (3, 1.5)},
    GREEDY | {"sequence_bias": [[[10], 5.0], [[11, 12], 3.0]]},
    GREEDY | {"renormalize_logits": True},
    GREEDY | {"remove_invalid_values": True},
    GREEDY | {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 3.0}},
    GREEDY | {"eos_token_id": list(range(2, 40))},
    GREEDY | {"prompt_lookup_num_tokens": 3},
    GREEDY | {"prompt_lookup_num_tokens": 30, "max_matching_ngram_size": 1},
    SAMPLED,
    SAMPLED | {"top_k": 40, "top_p": 0.75},
    SAMPLED | {"top_k": 5},
    SAMPLED | {"top_p": 0.5},
    SAMPLED | {"top_k": 0, "top_p": 0.9},
    SAMPLED | {"top_k": 0},
    SAMPLED | {"top_k": 280},
    SAMPLED | {"min_p": 0.1},
    SAMPLED | {"top_h": 0.4},
    SAMPLED | {"typical_p": 0.5},
    SAMPLED | {"epsilon_cutoff": 0.005},
    SAMPLED | {"eta_cutoff": 0.002},
    SAMPLED | {"repetition_penalty": 1.2, "top_k": 10},
    SAMPLED | {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
    SAMPLED | {"no_repeat_ngram_size": 3, "top_k": 20, "renormalize_logits": True},
]
FALLBACK = [
    GREEDY | {"num_beams": 4},
    GREEDY | {"num_beams": 3, "length_penalty": 0.3, "early_stopping": True},
    GREEDY | {"num_beams": 3, "early_stopping": "never"},
    GREEDY | {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
    SAMPLED | {"num_beams": 3},
    GREEDY | {"guidance_scale": 1.5},
    GREEDY | {"guidance_scale": 1.5, "negative_prompt_ids": [5, 6, 7]},
    SAMPLED | {"guidance_scale": 1.3, "top_k": 20},
    GREEDY | {"use_cache": False},
    GREEDY | {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 3.0, "seeding_scheme": "selfhash"}},
]


def prompt(length: int) -> list[int]:
    """Return a prompt of random tokens, the same for the same length."""
    numbers = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=numbers).tolist()


def expected(model: MistralForCausalLM, prompt_ids: list[int], num_tokens: int, fields: dict[str, Any]) -> list[int]:
    """Return the tokens of a plain `generate` call."""
    fields = dict(fields)
    if "negative_prompt_ids" in fields:
        fields["negative_prompt_ids"] = torch.tensor([fields["negative_prompt_ids"]])
    torch.manual_seed(SEED)
    ids = torch.tensor([prompt_ids])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unfeasible length constraints")
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **fields)
    return output[0, len(prompt_ids) :].tolist()


async def answer(
    engine: Engine, prompt_ids: list[int], num_tokens: int, fields: dict[str, Any]
) -> tuple[list[int], Finished]:
    """Return the tokens that the engine generates for one request, and its last event."""
    text = TokenIds()
    request = Request(prompt_ids, SamplingParams(fields, num_tokens, seed=SEED), [text])
    engine.submit([request])
    events = [event async for event in request.answer()]
    assert isinstance(events[-1], Finished)
    return text.ids, events[-1]
