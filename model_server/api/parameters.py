"""From the fields a client sent to `Parameters` that `generate` cannot choke on, and to `Sampling`.

Each field is checked by its row in `parameter_table.py`, then all of them together: whatever would crash or
stall a generation (every token forbidden, lengths that contradict, a rule that grows without end) is a
`BadRequest` before anything runs. Knows neither torch nor the wire format around it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from model_server.api.parameter_table import ALIASES, BY_NAME, LARGEST_SEED, REFUSED
from model_server.errors import BadRequest
from model_server.request import SamplingParams

COLDEST = 1e-6
"""Below this a temperature is 0: logits divided by it would overflow, and the likeliest token wins anyway."""

_DEFAULTS: dict[str, Any] = {"temperature": 0.1, "top_p": 0.75, "top_k": 40}
_NOT_FOR_GENERATE = {
    "stream",
    "return_full_text",
    "seed",
    "stop",
    "max_new_tokens",
    "max_length",
    "num_return_sequences",
}


@dataclass(frozen=True)
class ModelLimits:
    """What the served model bounds."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Parameters:
    """The parameters of one prompt, valid together."""

    limits: ModelLimits
    generate: Mapping[str, Any]
    """What the client gave for `generate`, with the defaults of sampling; the length comes later."""
    stream: bool = False
    return_full_text: bool = False
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 512
    max_length: int | None = None
    """The limit on prompt and answer; set only when `max_new_tokens` was not given."""
    num_requests: int = 1
    """Independent answers wanted: one request each."""
    num_choices: int = 1
    """Answers of one request: beams give several at once."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Where each field was given, for sentences about it."""

    @property
    def num_sequences(self) -> int:
        return self.num_requests * self.num_choices

    def seed_of(self, index: int) -> int | None:
        """Return the seed of the `index`-th of the independent requests."""
        return None if self.seed is None else (self.seed + index) % (LARGEST_SEED + 1)

    def sampling_for(self, num_prompt_tokens: int) -> SamplingParams:
        """Return how to generate after a prompt of this length.

        Raises:
            BadRequest: the prompt leaves no room, or the lengths make the other fields impossible.
        """
        limits = self.limits
        room = limits.max_model_len - num_prompt_tokens
        if room < 1:
            raise BadRequest(
                f"prompt has {num_prompt_tokens} tokens, and prompt and answer together may have "
                f"{limits.max_model_len}: it must have at most {limits.max_model_len - 1}.",
                field="prompt",
            )
        wanted = self.max_new_tokens
        if self.max_length is not None:
            wanted = self.max_length - num_prompt_tokens
            if wanted < 1:
                raise self._bad(
                    "max_length",
                    f"must be above the prompt's {num_prompt_tokens} tokens, not {self.max_length}",
                )
        for name, most in (("min_new_tokens", wanted), ("min_length", num_prompt_tokens + wanted)):
            if self.generate.get(name, 0) > most:
                raise self._bad(
                    name,
                    f"must be at most {most} with a prompt of {num_prompt_tokens} tokens and up to {wanted} "
                    f"new ones, not {self.generate[name]}",
                )
        max_new_tokens = min(wanted, room)
        self._check_tokens_left(num_prompt_tokens, max_new_tokens)
        self._check_negative_prompt(max_new_tokens)
        return SamplingParams(
            generate=self.generate,
            max_new_tokens=max_new_tokens,
            seed=self.seed,
            stop=self.stop,
            num_choices=self.num_choices,
        )

    def _bad(self, name: str, rule: str) -> BadRequest:
        return _bad(name, rule, self.labels)

    def _check_tokens_left(self, num_prompt_tokens: int, max_new_tokens: int) -> None:
        """Refuse lengths at which every token can become forbidden, which sampling cannot survive."""
        given, vocab_size = self.generate, self.limits.vocab_size
        begins_late = num_prompt_tokens == 1 and "forced_bos_token_id" in given
        if max_new_tokens == 1 + begins_late and "begin_suppress_tokens" in given:
            forced = _as_set(given.get("forced_eos_token_id"))
            if forced and forced <= _as_set(given["begin_suppress_tokens"]) | _as_set(given.get("suppress_tokens")):
                raise self._bad("forced_eos_token_id", "must not all be in begin_suppress_tokens for one new token")
        if given["do_sample"]:
            # A size-n rule bans a token for each distinct n-gram it has seen, at most one in n tokens.
            for name, length in (
                ("no_repeat_ngram_size", num_prompt_tokens + max_new_tokens),
                ("encoder_no_repeat_ngram_size", num_prompt_tokens),
            ):
                size = given.get(name, 0)
                if size and len(_forbidden(given, self.limits)) + length // size >= vocab_size:
                    raise self._bad(name, f"of {size} can forbid all {vocab_size} tokens here: ask for fewer tokens")
        start, factor = given.get("exponential_decay_length_penalty", (0, 1.0))
        if (max_new_tokens - start) * math.log10(factor) > 300:
            raise self._bad(
                "exponential_decay_length_penalty",
                f"grows beyond any number: lower its factor, {factor:g}, or ask for fewer tokens",
            )

    def _check_negative_prompt(self, max_new_tokens: int) -> None:
        num_negative = len(self.generate.get("negative_prompt_ids", ()))
        if num_negative + max_new_tokens > self.limits.max_model_len:
            raise self._bad(
                "negative_prompt_ids",
                f"of {num_negative} tokens and {max_new_tokens} new tokens together "
                f"pass {self.limits.max_model_len}: shorten one of them",
            )


def parse_parameters(
    raw: Mapping[str, Any], limits: ModelLimits, *, where: str = "", base: Mapping[str, Any] | None = None
) -> Parameters:
    """Validate the parameters of one prompt.

    Args:
        raw: the fields as the client sent them; null means not given.
        limits: what the model bounds.
        where: put before the fields' names in sentences, as in `instances[2].`.
        base: the request's `parameters` object: fields that `raw` does not give.

    Raises:
        BadRequest: the sentence names the field and what is allowed, or the nearest known name.
    """
    raw_values, labels = {}, {}
    for layer, prefix in ((base or {}, "parameters."), (raw, where)):
        for name, value, label in _known(layer, prefix):
            raw_values[name], labels[name] = value, label
    given = {
        name: BY_NAME[name].kind.check(value, labels[name], limits.vocab_size) for name, value in raw_values.items()
    }
    generate = _for_generate(given, labels)
    _check_together(given, labels, limits, do_sample=generate["do_sample"])
    beams = given.get("num_beams", 1)
    sequences = given.get("num_return_sequences", 1)
    return Parameters(
        limits=limits,
        generate=generate,
        stream=given.get("stream", False),
        return_full_text=given.get("return_full_text", False),
        seed=given.get("seed"),
        stop=given.get("stop", ()),
        max_new_tokens=given.get("max_new_tokens", 512),
        max_length=None if "max_new_tokens" in given else given.get("max_length"),
        num_requests=1 if beams > 1 else sequences,
        num_choices=sequences if beams > 1 else 1,
        labels=labels,
    )


def _known(layer: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any, str]]:
    """Yield (name, value, label) of the fields given, aliases resolved; refuse unknown names and doubles."""
    seen: dict[str, str] = {}
    for written, value in layer.items():
        label = prefix + written
        name = ALIASES.get(written, written)
        if name not in BY_NAME:
            raise _unknown(written, prefix)
        if value is None:
            continue
        if name in seen:
            raise BadRequest(f"{label} and {seen[name]} mean the same: give one of them.", field=label)
        seen[name] = label
        yield name, value, label


def _unknown(name: str, prefix: str) -> BadRequest:
    if name in REFUSED:
        return BadRequest(f"{prefix}{name} is not allowed: {REFUSED[name]}.", field=prefix + name)
    nearest = difflib.get_close_matches(name[:64], [*BY_NAME, *ALIASES], n=1, cutoff=0.0)[0]
    label = prefix + ascii(name[:64])[1:-1]
    return BadRequest(f"{label} is not a parameter; the nearest is {nearest}.", field=label)


def _bad(name: str, rule: str, labels: Mapping[str, str]) -> BadRequest:
    label = labels.get(name, name)
    return BadRequest(f"{label} {rule}.", field=label)


def _for_generate(given: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """Return what `generate` is told: the client's fields, and the defaults of sampling if it samples."""
    values = {name: value for name, value in given.items() if name not in _NOT_FOR_GENERATE}
    values = _DEFAULTS | values
    hot = values["temperature"] >= COLDEST
    values.setdefault("do_sample", hot)
    if values["do_sample"] and not hot:
        raise _bad("do_sample", "must not be true with temperature 0, which is greedy: leave one out", labels)
    if not values["do_sample"]:
        values = {name: value for name, value in values.items() if not BY_NAME[name].sampling_only}
    if "min_new_tokens" in values:
        values.pop("min_length", None)
    return values


def _check_together(given: Mapping[str, Any], labels: Mapping[str, str], limits: ModelLimits, do_sample: bool) -> None:
    """Refuse fields that are right alone and wrong together, as Transformers does or would have to."""
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
    refuse("exponential_decay_length_penalty", not ends, "needs an eos_token_id: the model has none")
    # It turns a forbidden end's -inf into the lowest float32, and the penalty multiplies that to an infinity.
    finite = given.get("remove_invalid_values", False)
    refuse("exponential_decay_length_penalty", finite, "does not work with remove_invalid_values")
    selfhash = given.get("watermarking_config", {}).get("seeding_scheme") == "selfhash"
    refuse("watermarking_config", selfhash and limits.vocab_size < 40, "selfhash needs a vocabulary of 40 tokens")
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        refuse(name, _as_set(given.get(name)) <= suppressed, "must not all be in suppress_tokens")
    for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
        rule = f"must leave a token to choose: together, all {limits.vocab_size} are forbidden"
        refuse(name, len(never) >= limits.vocab_size, rule)


def _forbidden(given: Mapping[str, Any], limits: ModelLimits) -> set[int]:
    """Return the tokens that may be forbidden at some step, whatever has been generated."""
    ends = _as_set(given.get("eos_token_id", limits.eos_token_ids))
    last_of_words = {ids[-1] for ids in given.get("bad_words_ids", ()) if len(ids) > 1 or ids[0] not in ends}
    held_back = ends if given.get("min_new_tokens") or given.get("min_length") else set()
    return _as_set(given.get("suppress_tokens")) | last_of_words | held_back


def _as_set(ids: int | Iterable[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
