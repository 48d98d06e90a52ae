"""Turns the fields of a client into valid `Parameters`, and then into `SamplingParams`.

Each field is validated by its declaration in `parameters.py`, then all of them together: whatever would crash or stall
a generation (every token forbidden, lengths that contradict, a rule that grows without end) is a `BadRequest` before
anything runs. Knows neither torch nor the wire format around it.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from model_server.api.grammars import given_grammars, one_grammar
from model_server.api.prompts import ModelLimits, room_after
from model_server.api.v1.parameters import ALIASES, OUR_DEFAULTS, UNSUPPORTED, GenerateParameters, about
from model_server.api.validation import printable, schema_of, validate
from model_server.errors import BadRequest
from model_server.request import SamplingParams
from model_server.text.grammar import GrammarSpec

MIN_TEMPERATURE = 1e-6
"""Below this a temperature is 0: logits divided by it would overflow, and the likeliest token wins anyway."""

Given = Mapping[str, Any]
Labels = Mapping[str, str]


@dataclass(frozen=True)
class Parameters:
    """The parameters of one prompt, valid together."""

    limits: ModelLimits
    values: GenerateParameters
    generate: Given
    """Arguments of `generate`: the client's, and the defaults of sampling; the length comes later."""
    labels: Labels = field(default_factory=dict)
    """How the client wrote each field's name, for sentences about it."""
    grammar: GrammarSpec | None = None
    """What the answer must match."""

    @property
    def num_requests(self) -> int:
        """Independent answers wanted: one request each."""
        return 1 if self.values.num_beams > 1 else self.values.num_return_sequences

    @property
    def num_choices(self) -> int:
        """Answers of one request: beams give several at once."""
        return self.values.num_return_sequences if self.values.num_beams > 1 else 1

    def sampling_for(self, num_prompt_tokens: int, label: str = "prompt") -> SamplingParams:
        """Return how to generate after a prompt of this length.

        Raises:
            BadRequest: the prompt leaves no room, or the lengths make the other fields impossible.
        """
        room = room_after(num_prompt_tokens, self.limits, label)
        length = self.values.max_new_tokens
        if self.values.max_length is not None and "max_new_tokens" not in self.labels:
            length = self.values.max_length - num_prompt_tokens
            if length < 1:
                rule = f"must be above the prompt's {num_prompt_tokens} tokens, not {self.values.max_length}"
                raise _bad("max_length", rule, self.labels)
        for name, most in (("min_new_tokens", length), ("min_length", num_prompt_tokens + length)):
            if self.generate.get(name, 0) > most:
                rule = (
                    f"must be at most {most} with a prompt of {num_prompt_tokens} tokens and up to {length} new ones, "
                    f"not {self.generate[name]}"
                )
                raise _bad(name, rule, self.labels)
        max_new_tokens = min(length, room)
        self._check_tokens_left(num_prompt_tokens, max_new_tokens)
        num_negative = len(self.generate.get("negative_prompt_ids", ()))
        if num_negative + max_new_tokens > self.limits.max_model_len:
            rule = (
                f"of {num_negative} tokens and {max_new_tokens} new tokens together pass {self.limits.max_model_len}: "
                "shorten one of them"
            )
            raise _bad("negative_prompt_ids", rule, self.labels)
        return SamplingParams(
            generate=self.generate,
            max_new_tokens=max_new_tokens,
            seed=self.values.seed,
            stop=self.values.stop_strings,
            num_choices=self.num_choices,
        )

    def _check_tokens_left(self, num_prompt_tokens: int, max_new_tokens: int) -> None:
        """Refuse lengths at which every token can become forbidden, because sampling would then fail."""
        given, vocab_size = self.generate, self.limits.vocab_size
        begins_late = num_prompt_tokens == 1 and "forced_bos_token_id" in given
        if max_new_tokens == 1 + begins_late and "begin_suppress_tokens" in given:
            forced = _as_set(given.get("forced_eos_token_id"))
            if forced and forced <= _as_set(given["begin_suppress_tokens"]) | _as_set(given.get("suppress_tokens")):
                rule = "must not all be in begin_suppress_tokens for one new token"
                raise _bad("forced_eos_token_id", rule, self.labels)
        if given["do_sample"]:
            # A size-n rule bans a token for each distinct n-gram it has seen, at most one in n tokens.
            for name, length in (
                ("no_repeat_ngram_size", num_prompt_tokens + max_new_tokens),
                ("encoder_no_repeat_ngram_size", num_prompt_tokens),
            ):
                size = given.get(name, 0)
                if size and len(_forbidden(given, self.limits)) + length // size >= vocab_size:
                    rule = f"of {size} can forbid all {vocab_size} tokens here: ask for fewer tokens"
                    raise _bad(name, rule, self.labels)
        start, factor = given.get("exponential_decay_length_penalty", (0, 1.0))
        if (max_new_tokens - start) * math.log10(factor) > 300:
            rule = f"grows beyond any number: lower its factor, {factor:g}, or ask for fewer tokens"
            raise _bad("exponential_decay_length_penalty", rule, self.labels)


def parse_parameters(
    raw: Mapping[str, Any],
    limits: ModelLimits,
    *,
    where: str = "",
    base: Mapping[str, Any] | None = None,
    model: type[GenerateParameters] = GenerateParameters,
) -> Parameters:
    """Validate the parameters of one prompt.

    Args:
        raw: the fields as the client sent them; null means not given.
        limits: what the served model bounds.
        where: put before the fields' names in sentences, as in `instances[2].`.
        base: the request's `parameters` object: fields that `raw` does not give.
        model: the parameters that this route knows, with its defaults.

    Raises:
        BadRequest: the sentence names the field and what is allowed, or the nearest known name.
    """
    given, labels = {}, {}
    for layer, prefix in ((base or {}, "parameters."), (raw, where)):
        for name, value, label in _known(layer, prefix, model):
            given[name], labels[name] = value, label
    values = validate(model, given, labels)
    given = {name: getattr(values, name) for name in given}
    for name in given.keys() & _token_id_fields(model):
        _check_vocabulary(given[name], labels[name], limits.vocab_size)
    generate = _for_generate(values, given, labels)
    _check_together(given, labels, limits, do_sample=generate["do_sample"])
    grammar = one_grammar(given_grammars(given, labels))
    if grammar is not None and "eos_token_id" in given:
        raise _bad("eos_token_id", f"does not work with {grammar.field}, which says where the text ends", labels)
    return Parameters(limits, values, generate, labels, grammar)


def _known(layer: Given, prefix: str, model: type[GenerateParameters]) -> Iterable[tuple[str, Any, str]]:
    """Yield (name, value, label) of the fields given, aliases resolved; refuse unknown names and doubles."""
    known = about(model)
    seen: dict[str, str] = {}
    for written, value in layer.items():
        label = prefix + written
        name = ALIASES.get(written, written)
        if name not in known:
            raise _unknown(written, prefix, model)
        if value is None:
            continue
        if name in seen:
            raise BadRequest(f"{label} and {seen[name]} mean the same: send only one of them.", field=label)
        seen[name] = label
        yield name, value, label


def _unknown(name: str, prefix: str, model: type[GenerateParameters]) -> BadRequest:
    if name in UNSUPPORTED:
        return BadRequest(f"{prefix}{name} is not allowed: {UNSUPPORTED[name]}.", field=prefix + name)
    nearest = difflib.get_close_matches(name[:64], [*model.model_fields, *ALIASES], n=1, cutoff=0.0)[0]
    label = prefix + printable(name)
    return BadRequest(f"{label} is not a parameter; the nearest is {nearest}.", field=label)


def _bad(name: str, rule: str, labels: Labels) -> BadRequest:
    label = labels.get(name, name)
    return BadRequest(f"{label} {rule}.", field=label)


@cache
def _token_id_fields(model: type[GenerateParameters]) -> frozenset[str]:
    """Return the names of the parameters that hold token ids."""
    properties = schema_of(model)["properties"]
    return frozenset(name for name, schema in properties.items() if '"token id"' in json.dumps(schema))


def _check_vocabulary(value: Any, label: str, vocab_size: int) -> None:
    """Refuse token ids that the model does not have, however deep in lists they are."""
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            if not isinstance(item, int) or not 0 <= item < vocab_size:
                _check_vocabulary(item, f"{label}[{i}]", vocab_size)
    elif isinstance(value, int) and not 0 <= value < vocab_size:
        raise BadRequest(f"{label} must be a token id from 0 to {vocab_size - 1}, not {value}.", field=label)


def _for_generate(values: GenerateParameters, given: Given, labels: Labels) -> dict[str, Any]:
    """Return the arguments of `generate`: the client's fields, and the defaults of sampling if it samples."""
    known = about(type(values))
    arguments = {name: getattr(values, name) for name in OUR_DEFAULTS}
    arguments |= {name: value for name, value in given.items() if known[name].for_generate}
    arguments.pop("num_return_sequences", None)
    can_sample = arguments["temperature"] >= MIN_TEMPERATURE
    arguments.setdefault("do_sample", can_sample)
    if arguments["do_sample"] and not can_sample:
        raise _bad("do_sample", "must not be true with temperature 0, which is greedy: leave one of them out", labels)
    if not arguments["do_sample"]:
        arguments = {name: value for name, value in arguments.items() if not known[name].sampling_only}
    if "min_new_tokens" in arguments:
        arguments.pop("min_length", None)
    if "sequence_bias" in arguments:
        arguments["sequence_bias"] = [list(pair) for pair in arguments["sequence_bias"]]
    if "watermarking_config" in arguments:
        arguments["watermarking_config"] = arguments["watermarking_config"].model_dump(exclude_unset=True)
    return arguments


def _check_together(given: Given, labels: Labels, limits: ModelLimits, do_sample: bool) -> None:
    """Refuse fields that are valid alone but not together, as Transformers does or should."""
    beams, sequences = given.get("num_beams", 1), given.get("num_return_sequences", 1)
    guided = given.get("guidance_scale", 1) != 1
    ends = _as_set(given.get("eos_token_id", limits.eos_token_ids))
    suppressed = _as_set(given.get("suppress_tokens"))
    never = _forbidden(given, limits) | _as_set(given.get("begin_suppress_tokens"))
    bad_words = given.get("bad_words_ids", ())

    def refuse(name: str, when: bool, rule: str) -> None:
        if name in given and when:
            raise _bad(name, rule, labels)

    refuse("num_return_sequences", 1 < beams < sequences, f"must be at most num_beams ({beams}), not {sequences}")
    refuse(
        "num_return_sequences",
        beams == 1 and sequences > 1 and not do_sample,
        f"must be 1 without sampling or beams, which give the same text each time, not {sequences}",
    )
    refuse("prompt_lookup_num_tokens", beams > 1, "does not work with num_beams above 1")
    refuse("prompt_lookup_num_tokens", guided, "does not work with guidance_scale")
    refuse("prompt_lookup_num_tokens", not given.get("use_cache", True), "does not work with use_cache false")
    refuse("negative_prompt_ids", not guided, "needs a guidance_scale other than 1")
    refuse("negative_prompt_ids", beams > 1, "does not work with num_beams above 1")
    only_ends = all(len(ids) == 1 and ids[0] in ends for ids in bad_words)
    refuse("bad_words_ids", only_ends, "must forbid more than the end of the text: for that, use min_new_tokens")
    repeated = _first_repeated(tuple(ids) for ids, _ in given.get("sequence_bias", ()))
    refuse("sequence_bias", repeated is not None, f"repeats the token ids of pair [{repeated}]: give each one bias")
    refuse("exponential_decay_length_penalty", not ends, "needs an eos_token_id: the model has none")
    # It turns a forbidden end's -inf into the lowest float32, and the penalty multiplies that to an infinity.
    finite = given.get("remove_invalid_values", False)
    refuse("exponential_decay_length_penalty", finite, "does not work with remove_invalid_values")
    watermark = given.get("watermarking_config")
    if watermark is not None and watermark.seeding_scheme == "selfhash":
        # With few green tokens Transformers finds none among the likeliest 40, and fails.
        few = watermark.greenlist_ratio is not None and watermark.greenlist_ratio < 0.25
        refuse("watermarking_config", few, 'must have a greenlist_ratio of at least 0.25 with "selfhash"')
        refuse("watermarking_config", limits.vocab_size < 40, "selfhash needs a vocabulary of 40 tokens")
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        refuse(name, _as_set(given.get(name)) <= suppressed, "must not all be in suppress_tokens")
    for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
        rule = f"must leave a token to choose: together, all {limits.vocab_size} are forbidden"
        refuse(name, len(never) >= limits.vocab_size, rule)


def _first_repeated(items: Iterable[tuple[int, ...]]) -> int | None:
    """Return the index of the first item that occurs again, or None."""
    first: dict[tuple[int, ...], int] = {}
    for i, item in enumerate(items):
        if item in first:
            return first[item]
        first[item] = i
    return None


def _forbidden(given: Given, limits: ModelLimits) -> set[int]:
    """Return the tokens that may be forbidden at some step, whatever has been generated."""
    ends = _as_set(given.get("eos_token_id", limits.eos_token_ids))
    last_of_words = {ids[-1] for ids in given.get("bad_words_ids", ()) if len(ids) > 1 or ids[0] not in ends}
    held_back = ends if given.get("min_new_tokens") or given.get("min_length") else set()
    return _as_set(given.get("suppress_tokens")) | last_of_words | held_back


def _as_set(ids: int | Iterable[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
