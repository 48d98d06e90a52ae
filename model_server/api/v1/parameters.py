"""The parameters of a predict request: one declaration each, and the names that are refused, each with its reason.

Validation, the OpenAPI document and the table in docs/api.md (`docs/parameter_table.py`) come from the declarations.
Every field of Transformers' `GenerationConfig` is in `GenerateParameters`, `ALIASES` or `UNSUPPORTED`, by test.
A default other than None is Transformers' own, except for those of the request itself and `OUR_DEFAULTS`. The rules
that bear on several parameters are in `parameter_rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

from model_server.text.grammar import MAX_CHOICES, MAX_SOURCE_CHARS

MAX_NEW_TOKENS = 4096
MAX_LIST = 1024
"""Entries of a list of tokens or words: each costs time at every step."""
MAX_SEQUENCE = 64
"""Tokens of one sequence in `bad_words_ids` or `sequence_bias`."""
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class About:
    """Facts about a parameter for the docs and the code, besides its type and bounds."""

    default: str = ""
    """The default in words, where the declared one does not say it."""
    batched: str = "yes"
    """Whether a request with it is generated in the shared batch. For the docs: the engine decides."""
    sampling_only: bool = False
    """Without effect in greedy decoding."""
    for_generate: bool = True
    """It is an argument of `generate`; the others are this server's."""


def _whole(value: object) -> object:
    """Take `5.0` for `5`, which JSON does not tell apart; past 2**53 a float no longer says which integer it is."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53 else value


Item = TypeVar("Item")
Flag = Annotated[bool, Strict()]
Int = Annotated[int, Strict()]
WHOLE = BeforeValidator(_whole)
"""Placed after the bounds, because what follows it is not in the JSON schema."""
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Count = Annotated[Int, Field(ge=0, le=2**31 - 1), WHOLE]
NewTokens = Annotated[Int, Field(ge=0, le=MAX_NEW_TOKENS), WHOLE]
FewSequences = Annotated[Int, Field(ge=1, le=16), WHOLE]
NgramSize = Annotated[Int, Field(ge=0, le=128), WHOLE]
Penalty = Annotated[Number, Field(ge=0.001, le=1000)]
Probability = Annotated[Number, Field(ge=0, le=1)]
PositiveFraction = Annotated[Number, Field(gt=0, le=1)]
Cutoff = Annotated[Number, Field(ge=0, lt=1)]
StopString = Annotated[str, Strict(), Field(min_length=1, max_length=256)]
StopStrings = StopString | Annotated[list[StopString], Field(max_length=16)]
Grammar = Annotated[str, Strict(), Field(min_length=1, max_length=MAX_SOURCE_CHARS)]
Choices = Annotated[list[Annotated[str, Strict(), Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]
# The bounds of a token id are the vocabulary's: `parameter_rules.py` knows it.
TokenId = Annotated[Int, Field(title="token id", json_schema_extra={"minimum": 0}), WHOLE]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]
TokenSequence = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_SEQUENCE, fail_fast=True)]
FewTokenIds = TokenId | Annotated[list[TokenId], Field(min_length=1, max_length=16)]
Biased = tuple[TokenSequence, Annotated[Number, Field(ge=-1e9, le=1e9)]]
Decay = tuple[Annotated[Int, Field(ge=0, le=1_000_000), WHOLE], Annotated[Number, Field(gt=0, le=10)]]

OF_SERVER = About(for_generate=False)
SAMPLING = About(sampling_only=True)
OF_MODEL = About(default="the model's")


class Watermarking(BaseModel):
    """The fields of Transformers' `WatermarkingConfig`."""

    model_config = ConfigDict(extra="forbid")
    greenlist_ratio: Annotated[Number, Field(gt=0, lt=1)] | None = None
    bias: Annotated[Number, Field(ge=-100, le=100)] | None = None
    hashing_key: Annotated[Int, Field(ge=1, le=2**31 - 1), WHOLE] | None = None
    seeding_scheme: Literal["lefthash", "selfhash"] | None = None
    context_width: Annotated[Int, Field(ge=1, le=MAX_SEQUENCE), WHOLE] | None = None


class GenerateParameters(BaseModel):
    """The parameters that control how a request's text is generated."""

    model_config = ConfigDict(extra="forbid")

    stream: Annotated[Flag, OF_SERVER] = Field(
        False, description="answer as server-sent events, as the text is generated"
    )
    return_full_text: Annotated[Flag, OF_SERVER] = Field(False, description="put the prompt before the generated text")
    seed: Annotated[Annotated[Int, Field(ge=0, le=LARGEST_SEED), WHOLE] | None, OF_SERVER] = Field(
        None, description="same seed, prompt and parameters: same text"
    )
    stop: Annotated[StopStrings | None, OF_SERVER] = Field(
        None, description="the text ends before the first of these strings (alias `stop_strings`)"
    )
    json_schema: Annotated[dict[str, Any] | None, OF_SERVER] = Field(
        None, title="a JSON schema, as an object", description="the answer is JSON that fits the schema"
    )
    regex: Annotated[Grammar | None, OF_SERVER] = Field(
        None, description="the whole answer matches the regular expression"
    )
    choice: Annotated[Choices | None, OF_SERVER] = Field(None, description="the answer is one of these texts")
    grammar: Annotated[Grammar | None, OF_SERVER] = Field(None, description="the answer is a text of this Lark grammar")
    max_new_tokens: Annotated[Annotated[Int, Field(ge=1, le=MAX_NEW_TOKENS), WHOLE], OF_SERVER] = Field(
        512, description="maximum number of tokens of the answer (alias `max_tokens`)"
    )
    max_length: Annotated[Annotated[Int, Field(ge=1, le=2**31 - 1), WHOLE] | None, OF_SERVER] = Field(
        None, description="maximum length of prompt and completion, if `max_new_tokens` is not set"
    )
    min_new_tokens: NewTokens = Field(0, description="the text does not end before this many new tokens")
    min_length: Count = Field(0, description="as `min_new_tokens`, prompt included; `min_new_tokens` overrides it")
    max_time: Annotated[Number, Field(gt=0, le=3600)] | None = Field(
        None, description="seconds after which the answer ends with `length`"
    )
    do_sample: Annotated[Flag | None, About(default="true when temperature > 0")] = Field(
        None, description="sample; false: always take the likeliest token"
    )
    temperature: Annotated[Annotated[Number, Field(ge=0, le=100)], SAMPLING] = Field(
        0.1, description="lower values are less random; 0 (or below 1e-6) is greedy"
    )
    top_k: Annotated[Count, SAMPLING] = Field(40, description="sample among this many likeliest tokens; 0 is off")
    top_p: Annotated[PositiveFraction, SAMPLING] = Field(
        0.75, description="sample among the likeliest tokens whose probabilities add up to this"
    )
    min_p: Annotated[Probability | None, SAMPLING] = Field(
        None, description="minimum probability, relative to the likeliest token"
    )
    top_h: Annotated[PositiveFraction | None, SAMPLING] = Field(
        None, description="share of the distribution's entropy to keep"
    )
    typical_p: Annotated[PositiveFraction, SAMPLING] = Field(
        1, description="sample among the most typical tokens whose probabilities add up to this"
    )
    epsilon_cutoff: Annotated[Cutoff, SAMPLING] = Field(0, description="minimum probability; 0 is off")
    eta_cutoff: Annotated[Cutoff, SAMPLING] = Field(
        0, description="minimum probability, adapted to the entropy; 0 is off"
    )
    repetition_penalty: Penalty = Field(1, description="above 1 makes tokens already seen less likely")
    encoder_repetition_penalty: Penalty = Field(1, description="above 1 makes the prompt's tokens likelier")
    no_repeat_ngram_size: NgramSize = Field(0, description="n-grams of this size occur only once; 0 is off")
    encoder_no_repeat_ngram_size: NgramSize = Field(
        0, description="n-grams of this size in the prompt do not occur again; 0 is off"
    )
    bad_words_ids: Annotated[list[TokenSequence], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)] | None = (
        Field(None, description="token sequences that are never generated")
    )
    sequence_bias: Annotated[list[Biased], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)] | None = Field(
        None, description="pairs [token ids, bias]: added to the logit of the sequence's last token"
    )
    suppress_tokens: TokenIds | None = Field(None, description="tokens that are never generated")
    begin_suppress_tokens: TokenIds | None = Field(None, description="tokens that are not generated first")
    forced_bos_token_id: TokenId | None = Field(None, description="the first new token, after a prompt of one token")
    forced_eos_token_id: FewTokenIds | None = Field(None, description="the last token when the length is used up")
    exponential_decay_length_penalty: Decay | None = Field(
        None, description="a pair [start, factor]: n tokens after `start` the end is factor^n times likelier"
    )
    eos_token_id: Annotated[FewTokenIds | None, OF_MODEL] = Field(None, description="tokens that end the text")
    pad_token_id: Annotated[TokenId | None, OF_MODEL] = Field(
        None, description="fills finished beams; does not appear in the text"
    )
    bos_token_id: Annotated[TokenId | None, OF_MODEL] = Field(
        None, description="accepted without effect; the tokenizer adds the first token"
    )
    remove_invalid_values: Flag = Field(False, description="replace NaN and infinite logits by finite numbers")
    renormalize_logits: Flag = Field(False, description="normalize the logits after all logits processors")
    watermarking_config: Annotated[Watermarking | None, About(batched='not with `seeding_scheme` "selfhash"')] = Field(
        None, description="watermark: make a keyed set of tokens likelier"
    )
    num_return_sequences: FewSequences = Field(
        1, description="answers for each prompt; sampled ones use seed, seed + 1, ..."
    )
    num_beams: Annotated[FewSequences, About(batched="not above 1")] = Field(
        1, description="beam search; cannot stream"
    )
    length_penalty: Annotated[Number, Field(ge=-10, le=10)] = Field(
        1, description="with beams: values above 0 favour longer texts"
    )
    early_stopping: Flag | Literal["never"] = Field(
        False, title='true, false or "never"', description="with beams: when to end the search"
    )
    guidance_scale: Annotated[Annotated[Number, Field(ge=0, le=100)] | None, About(batched="only 1")] = Field(
        None, description="classifier-free guidance; 1 is off"
    )
    negative_prompt_ids: Annotated[TokenIds | None, About(batched="no")] = Field(
        None, description="with guidance: tokens of the prompt to move away from"
    )
    prompt_lookup_num_tokens: Annotated[Int, Field(ge=1, le=64), WHOLE] | None = Field(
        None, description="guess up to this many tokens a step from the text so far; the answer stays the same"
    )
    max_matching_ngram_size: Annotated[Int, Field(ge=1, le=128), WHOLE] = Field(
        2, description="with prompt lookup: size of the longest n-gram to search for"
    )
    token_healing: Annotated[Flag, About(batched="not when true")] = Field(
        False, description="the prompt's last token may become a longer one"
    )
    use_cache: Annotated[Flag, About(batched="not when false")] = Field(
        True, description="keep the keys and values of earlier tokens"
    )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TrussParameters(GenerateParameters):
    """The parameters of the Truss routes: those of predict, and one of `tokenizer.decode`."""

    return_full_text: Annotated[Flag, OF_SERVER] = Field(True, description="put the prompt before the generated text")
    skip_special_tokens: Annotated[Flag, OF_SERVER] = Field(
        False, description="leave special tokens out of the text, as in `tokenizer.decode`"
    )


class TrussBody(TrussParameters):
    """The body of a predict request as a hosted Truss takes it."""

    prompt: str = Field(min_length=1)


ALIASES = {"max_tokens": "max_new_tokens", "stop_strings": "stop"}
OUR_DEFAULTS = ("temperature", "top_k", "top_p")
"""Arguments of `generate` that are passed with the declared default where the client gives none."""


@cache
def about(model: type[GenerateParameters]) -> dict[str, About]:
    """Return the facts about each parameter."""
    return {
        name: next((item for item in field.metadata if isinstance(item, About)), About())
        for name, field in model.model_fields.items()
    }


_CODE = "it would run code that is not part of this server"
_ENGINE = "it changes how the server computes, not what is generated"
_ASSISTANT = "it needs a second, assisting model, and this server loads only one"
_TENSORS = "it returns tensors, which a JSON answer cannot contain"
_REMOTE = "Transformers 5 runs it only with code from the hub"
_OBJECT = "it is a Python object, which JSON cannot carry"
_INPUT = 'the input is "prompt", "messages" or "instances"'
_NAMES_BY_REASON = {
    _CODE: "custom_generate trust_remote_code",
    _ENGINE: "cache_implementation cache_config max_cache_len compile_config disable_compile "
    "continuous_batching_config prefill_chunk_size low_memory synced_gpus past_key_values logits_to_keep",
    _ASSISTANT: "assistant_model assistant_tokenizer assistant_confidence_threshold assistant_lookbehind "
    "target_lookbehind assistant_ensemble_weight num_assistant_tokens num_assistant_tokens_schedule is_assistant "
    "speculation_type",
    "the model must be trained for it, and Mistral 7B is not": "assistant_early_exit use_mtp",
    _TENSORS: "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate",
    _REMOTE: "penalty_alpha dola_layers constraints force_words_ids num_beam_groups diversity_penalty",
    _OBJECT: "streamer logits_processor stopping_criteria prefix_allowed_tokens_fn tokenizer",
    _INPUT: "inputs input_ids inputs_embeds attention_mask position_ids",
    "the server attends to all of negative_prompt_ids": "negative_prompt_attention_mask",
    "it belongs to encoder-decoder models": "decoder_start_token_id",
    "send its fields as parameters of the request": "generation_config",
    "it describes a file, not a request": "transformers_version",
}
UNSUPPORTED = {name: reason for reason, names in _NAMES_BY_REASON.items() for name in names.split()}
"""Names that Transformers knows and this server refuses, with the reason."""
