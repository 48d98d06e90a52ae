"""The parameters: complete, documented, and safe to hand to Transformers' `generate`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from docs import parameter_table
from model_server.api.prompts import ModelLimits
from model_server.api.v1.parameter_rules import parse_parameters
from model_server.api.v1.parameters import ALIASES, OUR_DEFAULTS, UNSUPPORTED, GenerateParameters, about
from model_server.errors import BadRequest

VOCAB_SIZE = 64
LIMITS = ModelLimits(max_model_len=128, vocab_size=VOCAB_SIZE, eos_token_ids=(2,))
NAMES = set(GenerateParameters.model_fields)
PROMPT = [1, 5, 9, 5, 9, 7]
ALL_IDS = list(range(VOCAB_SIZE))


def sampling(num_prompt_tokens: int = len(PROMPT), **raw: object):
    return parse_parameters(raw, LIMITS).sampling_for(num_prompt_tokens)


def test_every_generation_config_field_is_supported_or_refused_with_a_reason():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - {*NAMES, *ALIASES, *UNSUPPORTED} == set()


def test_no_name_is_both_supported_and_refused():
    assert set(UNSUPPORTED).isdisjoint({*NAMES, *ALIASES})
    assert set(ALIASES.values()) <= NAMES


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_refused_name_is_answered_with_its_reason(name: str):
    with pytest.raises(BadRequest, match=re.escape(f"{name} is not allowed: {UNSUPPORTED[name]}.")):
        parse_parameters({name: None}, LIMITS)


def test_the_declared_defaults_are_those_of_transformers():
    known = about(GenerateParameters)
    ours = {name: field.default for name, field in GenerateParameters.model_fields.items() if field.default is not None}
    for name, default in GenerationConfig._get_default_generation_params().items():
        if name in ours and name not in OUR_DEFAULTS and known[name].for_generate:
            assert ours[name] == default, name


def test_documented_parameters_are_the_declared_ones():
    page = parameter_table.PAGE.read_text()
    assert parameter_table.rendered(page) == page, "run python -m docs.parameter_table"


def test_a_table_that_differs_fails_the_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    page = tmp_path / "api.md"
    page.write_text(parameter_table.PAGE.read_text().replace("| `top_k` |", "| `top_q` |"))
    monkeypatch.setattr(parameter_table, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["parameter_table", "--check"])
    assert parameter_table.main() == 1


@pytest.mark.parametrize(
    ("raw", "generate"),
    [
        ({}, {"do_sample": True, "temperature": 0.1, "top_p": 0.75, "top_k": 40}),
        ({"temperature": 0, "top_k": 5}, {"do_sample": False}),
        ({"temperature": 1e-300}, {"do_sample": False}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5, "min_p": 0.1}, {"do_sample": False}),
        (
            {"temperature": 1, "top_k": 0, "top_p": 1},
            {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
        ),
    ],
)
def test_generate_gets_the_sampling_parameters_only_if_it_samples(raw: dict, generate: dict):
    assert sampling(**raw).generate == generate


def test_whole_floats_are_integers_and_integers_are_floats_where_transformers_insists():
    arguments = sampling(top_k=5.0, temperature=1, repetition_penalty=2, sequence_bias=[[[5], 3]]).generate
    assert (arguments["top_k"], type(arguments["top_k"])) == (5, int)
    assert [type(arguments["temperature"]), type(arguments["repetition_penalty"])] == [float, float]
    assert arguments["sequence_bias"] == [[[5], 3.0]]


def test_null_means_not_given():
    assert parse_parameters(dict.fromkeys(NAMES), LIMITS) == parse_parameters({}, LIMITS)


@pytest.mark.parametrize(
    ("raw", "max_new_tokens"),
    [
        ({"max_new_tokens": 20}, 20),
        ({"max_new_tokens": 4096}, 118),
        ({}, 118),
        ({"max_length": 30}, 20),
        ({"max_length": 30, "max_new_tokens": 5}, 5),
        ({"max_length": 100_000}, 118),
    ],
)
def test_new_tokens_are_cut_to_the_room_a_prompt_of_10_leaves(raw: dict, max_new_tokens: int):
    assert sampling(10, **raw).max_new_tokens == max_new_tokens


def test_prompt_that_leaves_no_room_is_refused_with_the_numbers():
    with pytest.raises(BadRequest, match=r"prompt is 128 tokens; the maximum context length is 128"):
        sampling(128)


def test_min_new_tokens_wins_over_min_length_as_in_transformers():
    assert "min_length" not in sampling(min_new_tokens=3, min_length=50).generate


@pytest.mark.parametrize(
    ("written", "nearest"), [("topk", "top_k"), ("maxTokens", "max_tokens"), ("temprature", "temperature")]
)
def test_unknown_name_is_answered_with_the_nearest_known_one(written: str, nearest: str):
    with pytest.raises(BadRequest, match=f"{written} is not a parameter; the nearest is {nearest}."):
        parse_parameters({written: 1}, LIMITS)


@pytest.mark.parametrize(
    "raw",
    [
        {"suppress_tokens": ALL_IDS},
        {"suppress_tokens": ALL_IDS[1:], "begin_suppress_tokens": [0]},
        {"suppress_tokens": ALL_IDS[:2] + ALL_IDS[3:], "min_new_tokens": 1},
        {"bad_words_ids": [[i] for i in ALL_IDS], "eos_token_id": 2, "suppress_tokens": [2]},
        {"no_repeat_ngram_size": 1, "max_new_tokens": 100},
        {"encoder_no_repeat_ngram_size": 1, "suppress_tokens": ALL_IDS[6:]},
    ],
)
def test_parameters_that_can_forbid_every_token_are_refused(raw: dict):
    with pytest.raises(BadRequest, match="forbid"):
        sampling(**raw)


def test_penalty_on_length_needs_a_model_that_can_end():
    endless = ModelLimits(max_model_len=128, vocab_size=VOCAB_SIZE)
    with pytest.raises(BadRequest, match="exponential_decay_length_penalty needs an eos_token_id"):
        parse_parameters({"exponential_decay_length_penalty": [1, 1.1]}, endless)


# The edge of what each parameter allows, alone and with what it acts on. Token ids run to the vocabulary's last.
EXTREMES: list[dict] = [
    {"temperature": 1e-6},
    {"temperature": 100, "top_k": 2**31 - 1, "top_p": 1},
    {"top_p": 1e-12},
    {"top_k": 1},
    {"min_p": 0},
    {"min_p": 1},
    {"top_h": 1e-9},
    {"top_h": 1, "suppress_tokens": ALL_IDS[3:]},
    {"typical_p": 1e-9},
    {"typical_p": 0.99, "top_k": 1},
    {"epsilon_cutoff": 0.999999},
    {"eta_cutoff": 0.999999, "suppress_tokens": ALL_IDS[3:]},
    {"repetition_penalty": 0.001, "encoder_repetition_penalty": 1000, "temperature": 1e-6},
    {"repetition_penalty": 1000, "encoder_repetition_penalty": 0.001, "temperature": 1e-6},
    {
        "sequence_bias": [[[5], 1e9], [[63], -1e9], [[5, 7], 1e9]],
        "repetition_penalty": 0.001,
        "temperature": 1e-6,
    },
    {"no_repeat_ngram_size": 128},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 1, "max_new_tokens": 100, "do_sample": False},
    {"encoder_no_repeat_ngram_size": 128},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[i] for i in ALL_IDS[:62]]},
    {"bad_words_ids": [[2], [5, 7], [63]]},
    {"suppress_tokens": ALL_IDS[:63]},
    {"begin_suppress_tokens": ALL_IDS[:63]},
    {"forced_bos_token_id": 63},
    {"forced_eos_token_id": [2, 63], "begin_suppress_tokens": [2], "max_new_tokens": 1},
    {"forced_eos_token_id": 63, "suppress_tokens": [2]},
    {"exponential_decay_length_penalty": [0, 10.0], "suppress_tokens": [2]},
    {"exponential_decay_length_penalty": [3, 0.001]},
    {"exponential_decay_length_penalty": [0, 10.0], "min_new_tokens": 5},
    {"eos_token_id": [2, 63], "pad_token_id": 0, "bos_token_id": 1},
    {"min_new_tokens": 6},
    {"min_length": 12},
    {"max_time": 1e-9},
    {"remove_invalid_values": True, "renormalize_logits": True, "suppress_tokens": ALL_IDS[3:]},
    {"watermarking_config": {"greenlist_ratio": 1e-9, "bias": 100, "hashing_key": 2**31 - 1}},
    {"watermarking_config": {"seeding_scheme": "selfhash", "greenlist_ratio": 0.999, "context_width": 64}},
    {"watermarking_config": {"seeding_scheme": "selfhash", "greenlist_ratio": 0.5, "hashing_key": 2**31 - 1}},
    {"num_beams": 16, "num_return_sequences": 16, "do_sample": False},
    {"num_beams": 16, "num_return_sequences": 16, "top_k": 1},
    {"num_beams": 3, "temperature": 1e-6, "top_p": 1e-9},
    {"num_beams": 3, "length_penalty": 10, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": -10, "early_stopping": True, "do_sample": False},
    {"num_beams": 2, "suppress_tokens": ALL_IDS[:63], "do_sample": False},
    {"num_beams": 2, "suppress_tokens": ALL_IDS[:63]},
    {"num_beams": 2, "no_repeat_ngram_size": 1, "do_sample": False},
    {"num_beams": 16, "eos_token_id": ALL_IDS[:16], "do_sample": False},
    {"num_beams": 4, "guidance_scale": 3},
    {"num_beams": 4, "use_cache": False},
    {"guidance_scale": 0},
    {"guidance_scale": 100, "negative_prompt_ids": [63, 5]},
    {"guidance_scale": 2, "negative_prompt_ids": [5], "use_cache": False},
    {"prompt_lookup_num_tokens": 64, "max_matching_ngram_size": 128},
    {"prompt_lookup_num_tokens": 3, "do_sample": False, "suppress_tokens": ALL_IDS[10:]},
    {"prompt_lookup_num_tokens": 3, "watermarking_config": {}, "repetition_penalty": 1.5},
    {"use_cache": False},
]


# What looks at where the prompt ends also has to bear a prompt of one token.
AT_THE_BEGINNING = {
    "forced_bos_token_id",
    "begin_suppress_tokens",
    "prompt_lookup_num_tokens",
    "guidance_scale",
}
RUNS = [(raw, PROMPT) for raw in EXTREMES] + [(raw, [1]) for raw in EXTREMES if raw.keys() & AT_THE_BEGINNING]


@pytest.fixture(scope="module")
def model() -> Iterator[MistralForCausalLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small to share out
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.5,
    )
    yield MistralForCausalLM(config).eval()
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("raw", "prompt"), RUNS, ids=[f"{str(raw)[:70]}-{len(prompt)}" for raw, prompt in RUNS])
def test_whatever_is_accepted_runs_in_generate(model: MistralForCausalLM, raw: dict, prompt: list[int]):
    accepted = sampling(len(prompt), **{"max_new_tokens": 6} | raw)
    arguments = dict(accepted.generate)
    negative = arguments.pop("negative_prompt_ids", None)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformers warns of flags without effect; here only crashes matter
        output = model.generate(
            torch.tensor([prompt]),
            GenerationConfig(
                **arguments, max_new_tokens=accepted.max_new_tokens, num_return_sequences=accepted.num_choices
            ),
            negative_prompt_ids=None if negative is None else torch.tensor([negative]),
        )
    assert output.shape[0] == accepted.num_choices
    assert len(prompt) < output.shape[1] <= len(prompt) + accepted.max_new_tokens
