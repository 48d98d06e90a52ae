"""The parameters of a predict request: one row each, and the names that are refused, each with its reason.

`TABLE` says what a parameter may be, its default, whether it is batched and its meaning; docs/api.md has the same rows.
Every field of Transformers' `GenerationConfig` is in `TABLE`, `ALIASES` or `REFUSED`, by test.
How parameters bear on one another is `parameters.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_server.api.fields import (
    DecayPenalty,
    Flag,
    FlagOrNever,
    Integer,
    Kind,
    Number,
    SequenceBias,
    StopStrings,
    TokenId,
    TokenIds,
    TokenSequences,
    Watermarking,
)

MAX_NEW_TOKENS = 4096
MAX_BEAMS = 16
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Parameter:
    """One row of the table."""

    name: str
    kind: Kind
    default: str
    meaning: str
    batched: str = "yes"
    """For the docs: "yes", or the values that cannot be batched (`engine.batchable.can_batch`)."""
    sampling_only: bool = False
    """Without effect in greedy decoding."""


NGRAM = Integer(0, 128)
PENALTY = Number(0.001, 1000)
FRACTION = Number(0, 1, open_high=True)
POSITIVE_FRACTION = Number(0, 1, open_low=True)

TABLE: tuple[Parameter, ...] = (
    Parameter("stream", Flag(), "false", "answer as server-sent events, as the text is made"),
    Parameter("return_full_text", Flag(), "false", "the prompt in front of the text"),
    Parameter("seed", Integer(0, LARGEST_SEED), "none", "same seed, prompt and parameters: same text"),
    Parameter("stop", StopStrings(), "none", "the text ends before the first of these (alias `stop_strings`)"),
    Parameter("max_new_tokens", Integer(1, MAX_NEW_TOKENS), "512", "tokens the answer may have (alias `max_tokens`)"),
    Parameter("max_length", Integer(1, 2**31 - 1), "none", "prompt and answer, when `max_new_tokens` is not given"),
    Parameter("min_new_tokens", Integer(0, MAX_NEW_TOKENS), "0", "no end of text before this many new tokens"),
    Parameter("min_length", Integer(0, 2**31 - 1), "0", "the same, prompt counted; `min_new_tokens` wins"),
    Parameter(
        "max_time",
        Number(0, 3600, open_low=True),
        "none",
        "seconds after which the answer ends with `length`",
    ),
    Parameter("do_sample", Flag(), "true when temperature > 0", "sample; false takes the likeliest token"),
    Parameter(
        "temperature",
        Number(0, 100),
        "0.1",
        "lower is more certain; 0 (or below 1e-6) is greedy",
        sampling_only=True,
    ),
    Parameter("top_k", Integer(0, 2**31 - 1), "40", "sample among the k likeliest; 0 is off", sampling_only=True),
    Parameter("top_p", POSITIVE_FRACTION, "0.75", "sample among the likeliest with this mass", sampling_only=True),
    Parameter("min_p", Number(0, 1), "none", "least probability, relative to the likeliest", sampling_only=True),
    Parameter("top_h", POSITIVE_FRACTION, "none", "share of the distribution's entropy kept", sampling_only=True),
    Parameter("typical_p", POSITIVE_FRACTION, "1", "mass of the most typical tokens kept", sampling_only=True),
    Parameter("epsilon_cutoff", FRACTION, "0", "least probability; 0 is off", sampling_only=True),
    Parameter("eta_cutoff", FRACTION, "0", "least probability, adapted to entropy; 0 is off", sampling_only=True),
    Parameter("repetition_penalty", PENALTY, "1", "above 1 makes tokens already seen less likely"),
    Parameter("encoder_repetition_penalty", PENALTY, "1", "above 1 makes the prompt's tokens likelier"),
    Parameter("no_repeat_ngram_size", NGRAM, "0", "n-grams of this size occur once; 0 is off"),
    Parameter("encoder_no_repeat_ngram_size", NGRAM, "0", "n-grams of the prompt do not occur; 0 is off"),
    Parameter("bad_words_ids", TokenSequences(), "none", "token sequences that are never generated"),
    Parameter("sequence_bias", SequenceBias(), "none", "added to the logit of a sequence's last token"),
    Parameter("suppress_tokens", TokenIds(), "none", "tokens that are never generated"),
    Parameter("begin_suppress_tokens", TokenIds(), "none", "tokens that do not come first"),
    Parameter("forced_bos_token_id", TokenId(), "none", "the first new token, after a prompt of one token"),
    Parameter("forced_eos_token_id", TokenIds(16, or_one=True), "none", "the last token when the length is used up"),
    Parameter("exponential_decay_length_penalty", DecayPenalty(), "none", "the end grows likelier by factor^n"),
    Parameter("eos_token_id", TokenIds(16, or_one=True), "the model's", "tokens that end the text"),
    Parameter("pad_token_id", TokenId(), "the model's", "fills finished beams; never in the text"),
    Parameter("bos_token_id", TokenId(), "the model's", "accepted; the tokenizer begins the prompt"),
    Parameter("remove_invalid_values", Flag(), "false", "replace NaN and infinite logits"),
    Parameter("renormalize_logits", Flag(), "false", "normalize after all processors"),
    Parameter(
        "watermarking_config",
        Watermarking(),
        "none",
        "favour a keyed set of tokens",
        batched='not with `seeding_scheme` "selfhash"',
    ),
    Parameter(
        "num_return_sequences",
        Integer(1, MAX_BEAMS),
        "1",
        "answers for each prompt; sampled ones use seed, seed + 1, ...",
    ),
    Parameter(
        "num_beams",
        Integer(1, MAX_BEAMS),
        "1",
        "beam search; cannot stream",
        batched="not above 1",
    ),
    Parameter("length_penalty", Number(-10, 10), "1", "with beams: above 0 favours longer texts"),
    Parameter("early_stopping", FlagOrNever(), "false", "with beams: when to stop looking"),
    Parameter(
        "guidance_scale",
        Number(0, 100),
        "none",
        "classifier-free guidance; 1 is off",
        batched="only 1",
    ),
    Parameter(
        "negative_prompt_ids",
        TokenIds(),
        "none",
        "with guidance: what to move away from",
        "no",
    ),
    Parameter(
        "prompt_lookup_num_tokens",
        Integer(1, 64),
        "none",
        "guess this many tokens from the prompt, then check them",
        "no",
    ),
    Parameter("max_matching_ngram_size", Integer(1, 128), "2", "with prompt lookup: longest n-gram looked up"),
    Parameter("token_healing", Flag(), "false", "let the prompt's last token grow", "not when true"),
    Parameter("use_cache", Flag(), "true", "keep the keys and values", "not when false"),
)
BY_NAME = {parameter.name: parameter for parameter in TABLE}
ALIASES = {"max_tokens": "max_new_tokens", "stop_strings": "stop"}

_CODE = "it would run code that is not part of this server"
_ENGINE = "it changes how the server computes, not what is generated"
_ASSISTANT = "it belongs to a second, assisting model, and this server loads one"
_TENSORS = "it returns tensors, which the answer has no place for"
_REMOTE = "Transformers 5 runs it only with code from the hub"
_OBJECT = "it is a Python object, which JSON cannot carry"
_INPUT = 'the input is "prompt", "messages" or "instances"'
REFUSED: dict[str, str] = {
    **dict.fromkeys(("custom_generate", "trust_remote_code"), _CODE),
    **dict.fromkeys(
        ("cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
        _ENGINE,
    ),
    **dict.fromkeys(("continuous_batching_config", "prefill_chunk_size", "low_memory", "synced_gpus"), _ENGINE),
    **dict.fromkeys(("past_key_values", "logits_to_keep"), _ENGINE),
    **dict.fromkeys(("assistant_model", "assistant_tokenizer", "assistant_confidence_threshold"), _ASSISTANT),
    **dict.fromkeys(("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"), _ASSISTANT),
    **dict.fromkeys(("num_assistant_tokens", "num_assistant_tokens_schedule", "is_assistant"), _ASSISTANT),
    **dict.fromkeys(("speculation_type",), _ASSISTANT),
    **dict.fromkeys(("assistant_early_exit", "use_mtp"), "the model must be trained for it, and Mistral 7B is not"),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), _TENSORS),
    **dict.fromkeys(("return_dict_in_generate",), _TENSORS),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "constraints", "force_words_ids"), _REMOTE),
    **dict.fromkeys(("num_beam_groups", "diversity_penalty"), _REMOTE),
    **dict.fromkeys(("streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"), _OBJECT),
    **dict.fromkeys(("tokenizer",), _OBJECT),
    **dict.fromkeys(("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids"), _INPUT),
    "negative_prompt_attention_mask": "all of negative_prompt_ids is attended to",
    "decoder_start_token_id": "it belongs to encoder-decoder models",
    "generation_config": "its fields are given one by one, beside the prompt",
    "transformers_version": "it describes a file, not a request",
}
