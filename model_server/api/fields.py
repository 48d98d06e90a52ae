"""What the value of one request field may be: a small class for each kind, used by `parameter_table.py`.

A kind turns a JSON value into the value Transformers expects (`1` becomes `1.0` where a float is wanted) or
raises `BadRequest` with a sentence that names the field and what is allowed; the docs print the same words
(`kind.allowed`). Every list has a length limit, so that checking costs no more than the body's size.
Owns single values; how fields bear on one another is `parameters.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from model_server.errors import BadRequest

MAX_LIST = 1024
"""Entries of a list of tokens or words: each costs time at every step."""
MAX_SEQUENCE = 64
"""Tokens of one sequence in `bad_words_ids` or `sequence_bias`."""


Schema = dict[str, Any]
"""A JSON schema."""


class Kind(Protocol):
    """What all kinds share."""

    @property
    def allowed(self) -> str:
        """Say what is allowed, to fit after 'must be'."""
        ...

    @property
    def schema(self) -> Schema:
        """Say the same as a JSON schema; what only the model can tell, such as its vocabulary, is left out."""
        ...

    def check(self, value: Any, label: str, vocab_size: int) -> Any:
        """Return the value as Transformers wants it; raise BadRequest naming `label` if it may not be."""
        ...


def shown(value: object) -> str:
    """Describe a value in a sentence: short, and without its text, which may be a prompt."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value) if abs(value) < 1e15 else f"{value:.3g}" if abs(value) < 1e300 else "a huge number"
    if isinstance(value, str):
        return "a string" if value else "an empty string"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _array(items: Schema, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most}


def _pair(first: Schema, second: Schema) -> Schema:
    return {"type": "array", "prefixItems": [first, second], "minItems": 2, "maxItems": 2}


def refuse(kind: Kind, value: object, label: str) -> BadRequest:
    return BadRequest(f"{label} must be {kind.allowed}, not {shown(value)}.", field=label)


def as_integer(value: object) -> int | None:
    """Return a JSON number that is whole (`5` or `5.0`, which JSON does not tell apart), else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    # Past 2**53 a float no longer says which integer was meant.
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53 else None


@dataclass(frozen=True)
class Flag:
    allowed = "true or false"

    @property
    def schema(self) -> Schema:
        return {"type": "boolean"}

    def check(self, value: Any, label: str, vocab_size: int) -> bool:
        if not isinstance(value, bool):
            raise refuse(self, value, label)
        return value


@dataclass(frozen=True)
class Integer:
    low: int
    high: int

    @property
    def allowed(self) -> str:
        return f"an integer from {self.low} to {self.high}"

    @property
    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def check(self, value: Any, label: str, vocab_size: int) -> int:
        number = as_integer(value)
        if number is None or not self.low <= number <= self.high:
            raise refuse(self, value, label)
        return number


@dataclass(frozen=True)
class Number:
    low: float
    high: float
    open_low: bool = False
    """The lowest value itself is not allowed."""
    open_high: bool = False

    @property
    def allowed(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"from {self.low:g}"
        high = f"below {self.high:g}" if self.open_high else f"to {self.high:g}"
        joint = " and " if self.open_low or self.open_high else " "
        if self.open_low and not self.open_high:
            high = f"at most {self.high:g}"
        return f"a number {low}{joint}{high}"

    @property
    def schema(self) -> Schema:
        low = "exclusiveMinimum" if self.open_low else "minimum"
        high = "exclusiveMaximum" if self.open_high else "maximum"
        return {"type": "number", low: self.low, high: self.high}

    def check(self, value: Any, label: str, vocab_size: int) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refuse(self, value, label)
        # Integers compare exactly and never overflow, so the bounds come before float().
        inside = self.low <= value <= self.high and math.isfinite(value)
        if not inside or (self.open_low and value == self.low) or (self.open_high and value == self.high):
            raise refuse(self, value, label)
        return float(value)


@dataclass(frozen=True)
class FlagOrNever:
    allowed = 'true, false or "never"'

    @property
    def schema(self) -> Schema:
        return {"enum": [True, False, "never"]}

    def check(self, value: Any, label: str, vocab_size: int) -> bool | str:
        if isinstance(value, bool) or value == "never":
            return value
        raise refuse(self, value, label)


@dataclass(frozen=True)
class StopStrings:
    most: int = 16
    longest: int = 256

    @property
    def allowed(self) -> str:
        return f"a string, or a list of up to {self.most}, each of 1 to {self.longest} characters"

    @property
    def schema(self) -> Schema:
        string = {"type": "string", "minLength": 1, "maxLength": self.longest}
        return {"anyOf": [string, {"type": "array", "items": string, "maxItems": self.most}]}

    def check(self, value: Any, label: str, vocab_size: int) -> tuple[str, ...]:
        strings = [value] if isinstance(value, str) else value
        if not isinstance(strings, list) or len(strings) > self.most:
            raise refuse(self, value, label)
        for string in strings:
            if not isinstance(string, str) or not 1 <= len(string) <= self.longest:
                raise refuse(self, string, label)
            check_unicode(string, label)
        return tuple(strings)


@dataclass(frozen=True)
class TokenId:
    allowed = "a token id, from 0 to the vocabulary's size less 1"

    @property
    def schema(self) -> Schema:
        return {"type": "integer", "minimum": 0}

    def check(self, value: Any, label: str, vocab_size: int) -> int:
        return Integer(0, vocab_size - 1).check(value, label, vocab_size)


@dataclass(frozen=True)
class TokenIds:
    most: int = MAX_LIST
    or_one: bool = False
    """One id may stand without its list."""

    @property
    def allowed(self) -> str:
        return f"{'a token id or ' if self.or_one else ''}a list of 1 to {self.most} token ids"

    @property
    def schema(self) -> Schema:
        ids = _array(TokenId().schema, self.most)
        return {"anyOf": [TokenId().schema, ids]} if self.or_one else ids

    def check(self, value: Any, label: str, vocab_size: int) -> int | list[int]:
        if self.or_one and as_integer(value) is not None:
            return TokenId().check(value, label, vocab_size)
        if not isinstance(value, list) or not 1 <= len(value) <= self.most:
            raise refuse(self, value, label)
        return [TokenId().check(token, f"{label}[{i}]", vocab_size) for i, token in enumerate(value)]


@dataclass(frozen=True)
class TokenSequences:
    allowed = f"a list of 1 to {MAX_LIST} lists of 1 to {MAX_SEQUENCE} token ids"

    @property
    def schema(self) -> Schema:
        return _array(TokenIds(MAX_SEQUENCE).schema, MAX_LIST)

    def check(self, value: Any, label: str, vocab_size: int) -> list[list[int]]:
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_LIST:
            raise refuse(self, value, label)
        sequence = TokenIds(MAX_SEQUENCE)
        return [sequence.check(ids, f"{label}[{i}]", vocab_size) for i, ids in enumerate(value)]  # type: ignore[misc]


@dataclass(frozen=True)
class SequenceBias:
    """Transformers' list form: its dict form has tuples for keys, which JSON cannot write."""

    allowed = f"a list of 1 to {MAX_LIST} pairs [[1 to {MAX_SEQUENCE} token ids], bias from -1e9 to 1e9]"
    bias = Number(-1e9, 1e9)

    @property
    def schema(self) -> Schema:
        return _array(_pair(TokenIds(MAX_SEQUENCE).schema, self.bias.schema), MAX_LIST)

    def check(self, value: Any, label: str, vocab_size: int) -> list[list[Any]]:
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_LIST:
            raise refuse(self, value, label)
        pairs, seen = [], set()
        for i, pair in enumerate(value):
            here = f"{label}[{i}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise BadRequest(f"{here} must be a pair [[token ids], bias], not {shown(pair)}.", field=label)
            ids = TokenIds(MAX_SEQUENCE).check(pair[0], f"{here}[0]", vocab_size)
            bias = self.bias.check(pair[1], f"{here}[1]", vocab_size)
            key = tuple(ids)  # type: ignore[arg-type]
            if key in seen:
                raise BadRequest(f"{here} repeats the token ids of an earlier pair: give each one bias.", field=label)
            seen.add(key)
            pairs.append([ids, bias])
        return pairs


@dataclass(frozen=True)
class DecayPenalty:
    allowed = "a pair [start, factor]: the new tokens before it begins, and a number above 0 and at most 10"
    start = Integer(0, 1_000_000)
    factor = Number(0, 10, open_low=True)

    @property
    def schema(self) -> Schema:
        return _pair(self.start.schema, self.factor.schema)

    def check(self, value: Any, label: str, vocab_size: int) -> tuple[int, float]:
        if not isinstance(value, list) or len(value) != 2:
            raise refuse(self, value, label)
        start = self.start.check(value[0], f"{label}[0]", vocab_size)
        return start, self.factor.check(value[1], f"{label}[1]", vocab_size)


@dataclass(frozen=True)
class Choice:
    options: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return " or ".join(f'"{option}"' for option in self.options)

    @property
    def schema(self) -> Schema:
        return {"enum": list(self.options)}

    def check(self, value: Any, label: str, vocab_size: int) -> str:
        if not isinstance(value, str) or value not in self.options:
            raise refuse(self, value, label)
        return value


@dataclass(frozen=True)
class Watermarking:
    """The fields of Transformers' `WatermarkingConfig`; it converts the dict itself."""

    allowed = "an object with any of greenlist_ratio, bias, hashing_key, seeding_scheme, context_width"
    kinds: ClassVar[dict[str, Kind]] = {
        "greenlist_ratio": Number(0, 1, open_low=True, open_high=True),
        "bias": Number(-100, 100),
        "hashing_key": Integer(1, 2**31 - 1),
        "seeding_scheme": Choice(("lefthash", "selfhash")),
        "context_width": Integer(1, MAX_SEQUENCE),
    }

    @property
    def schema(self) -> Schema:
        properties = {name: kind.schema for name, kind in self.kinds.items()}
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def check(self, value: Any, label: str, vocab_size: int) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise refuse(self, value, label)
        checked = {}
        for name, item in value.items():
            if name not in self.kinds:
                raise BadRequest(f"{label} must be {self.allowed}; {shown(name)} is none of them.", field=label)
            checked[name] = self.kinds[name].check(item, f"{label}.{name}", vocab_size)
        if checked.get("seeding_scheme") == "selfhash" and checked.get("greenlist_ratio", 0.25) < 0.25:
            # With few green tokens Transformers finds none among the likeliest 40, and fails.
            raise BadRequest(f'{label}.greenlist_ratio must be at least 0.25 with "selfhash".', field=label)
        return checked


def check_unicode(text: str, label: str) -> None:
    """Refuse text that cannot be UTF-8: half of a surrogate pair, which JSON's escapes can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(
            f"{label} must be valid Unicode: character {error.start} is half of a surrogate pair.",
            field=label,
        ) from None
