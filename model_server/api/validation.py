"""Turns an error of pydantic into one sentence: the field as the client wrote it, the allowed values, the value.

The allowed values come from the model's JSON schema, so that the sentences, the OpenAPI document and the tables in the
docs agree. A sentence never repeats text of the body, which may be a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from model_server.errors import BadRequest

Schema = dict[str, Any]
"""A JSON schema."""
AnyModel = TypeVar("AnyModel", bound=BaseModel)


class PlainSchema(GenerateJsonSchema):
    """JSON schemas without generated titles: a title is the description of the allowed values."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def schema_of(model: type[BaseModel]) -> Schema:
    """Return a model's JSON schema."""
    return model.model_json_schema(schema_generator=PlainSchema)


def validate(model: type[AnyModel], values: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> AnyModel:
    """Return the values as a model.

    Args:
        labels: how the client wrote the fields' names, where that is not how the model has them.

    Raises:
        BadRequest: the sentence names the field and says what is allowed.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, model, values, labels or {}) from None


def describe(value: object) -> str:
    """Describe a value for a sentence, without its text, which may be a prompt."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value) if abs(value) < 1e15 else f"{value:.3g}" if abs(value) < 1e300 else "a huge number"
    if isinstance(value, str):
        return "a string" if value else "an empty string"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def printable(name: str) -> str:
    """Return a field's name as a sentence may show it: short, in ASCII."""
    return ascii(name[:64])[1:-1]


def check_unicode(text: str, label: str) -> None:
    """Refuse text that cannot be UTF-8: half of a surrogate pair, which JSON's escapes can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(
            f"{label} must be valid Unicode: character {error.start} is half of a surrogate pair.", field=label
        ) from None


def allowed(schema: Schema, defs: Mapping[str, Schema] | None = None) -> str:
    """Say what a schema allows, to fit after "must be"."""
    branches = _branches(schema)
    if len(branches) > 1:
        return str(schema.get("title") or " or ".join(allowed(branch, defs) for branch in branches))
    noun, rest = _phrase(branches[0], defs or {})
    if not noun:
        return rest
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun} {rest}".rstrip()


class _Place(NamedTuple):
    """A value somewhere in a body."""

    label: str
    schema: Schema
    value: Any
    depth: int = 0
    unknown: str = ""
    """The name that its schema has no property for."""


def _refusal(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any], labels: Mapping[str, str]
) -> BadRequest:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    root = _Place("", schema_of(model), values)
    defs = root.schema.get("$defs", {})
    # The branch of a union that fits the longest part of the value.
    first = [entry for entry in found if entry["loc"][:1] == found[0]["loc"][:1]]
    places = [(_follow(entry["loc"], root, defs, labels), entry) for entry in first]
    place, entry = max(places, key=lambda pair: pair[0].depth)
    if entry["type"] == "missing" and isinstance(entry["loc"][-1], str):
        rule = "must be given"
    elif place.unknown:
        # For an object within the body, name the fields that it may have.
        known = f"; {place.label.rpartition('.')[0]} must be {allowed(place.schema, defs)}" if place.depth > 1 else ""
        rule = f"is not a field of this request{known}"
    elif entry["type"] == "string_unicode":
        rule = "must be valid Unicode, without half of a surrogate pair"
    else:
        rule = f"must be {allowed(place.schema, defs)}"
        if not (isinstance(place.value, str) and place.schema.keys() & {"enum", "const"}):
            too_many = entry["type"] == "too_long" and isinstance(place.value, Mapping)
            given = f"one of {len(place.value)}" if too_many else describe(place.value)
            rule += f", not {given}"  # "not a string" says nothing where only some strings are allowed
    return BadRequest(f"{place.label} {rule}.", field=place.label)


def _follow(loc: tuple[int | str, ...], root: _Place, defs: Mapping[str, Schema], labels: Mapping[str, str]) -> _Place:
    """Return the place of an error; in a union, of the whole union unless a list was given and its items are wrong."""
    label, schema, value, _, _ = root
    for depth, part in enumerate(loc):
        branches = _branches(schema)
        if len(branches) > 1:
            lists = [branch for branch in branches if branch.get("type") == "array"]
            in_list = isinstance(value, list) and str(part).startswith("list[") and depth < len(loc) - 1
            if not in_list or len(lists) != 1:
                return _Place(label, schema, value, depth)
            schema = lists[0]
            continue
        schema = _resolved(branches[0], defs)
        if isinstance(part, int):
            if part >= len(value):  # a pair lacks an item
                return _Place(label, schema, value, depth)
            label += f"[{part}]"
            items = schema.get("prefixItems")
            schema = items[part] if items else schema["items"]
            value = value[part]
            continue
        name = labels.get(part, printable(part)) if not label else printable(part)
        label += f".{name}" if label else name
        properties = schema.get("properties", {})
        extra = schema.get("additionalProperties")
        if part not in properties and not isinstance(extra, dict):
            return _Place(label, schema, value, depth + 1, unknown=part)
        schema = properties.get(part, extra)
        value = value.get(part)
    return _Place(label, schema, value, len(loc))


def _resolved(schema: Schema, defs: Mapping[str, Schema]) -> Schema:
    return defs[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _branches(schema: Schema) -> list[Schema]:
    """Return the schemas of which one must hold; null is left out, because it means that nothing was given."""
    return [branch for branch in schema.get("anyOf", [schema]) if branch.get("type") != "null"]


def _phrase(schema: Schema, defs: Mapping[str, Schema]) -> tuple[str, str]:
    """Return a noun and what follows it, so that it can be made plural; without a noun, the whole phrase."""
    schema = _resolved(schema, defs)
    if "enum" in schema or "const" in schema:
        return "", _listed([_written(value) for value in schema.get("enum", [schema.get("const")])])
    match schema.get("type"):
        case "boolean":
            return "", "true or false"
        case "integer" | "number" as kind:
            return str(schema.get("title", kind)), "" if "title" in schema else _bounds(schema)
        case "string":
            return "string", _length(schema, "minLength", "maxLength", " characters")
        case "array" if "prefixItems" in schema:
            return "pair", f"[{', '.join(allowed(item, defs) for item in schema['prefixItems'])}]"
        case "array":
            noun, rest = _phrase(schema["items"], defs)
            items = f" {noun}s {rest}".rstrip() if noun else f" {rest}"
            return "list", _length(schema, "minItems", "maxItems", items) or f"of{items}"
        case _:
            required = " and ".join(schema.get("required", ()))
            optional = ", ".join(schema.get("properties", ()))
            if required or optional:
                return "object", f"with {required}" if required else f"with any of {optional}"
            return "object", _length(schema, "minProperties", "maxProperties", " names")


def _length(schema: Schema, low_key: str, high_key: str, unit: str) -> str:
    low, high = schema.get(low_key, 0), schema.get(high_key)
    if high is None:
        return f"of at least {low}{unit}" if low else ""
    return f"of {low} to {high}{unit}" if low else f"of up to {high}{unit}"


def _bounds(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")

    def write(bound: float) -> str:
        return str(bound) if schema["type"] == "integer" else f"{bound:g}".replace("e+0", "e")

    if low is not None and high is not None:
        return f"from {write(low)} to {write(high)}"
    bounds = [
        text.format(write(bound))
        for text, bound in (("above {}", above), ("of at least {}", low), ("below {}", below), ("at most {}", high))
        if bound is not None
    ]
    return " and ".join(bounds)


def _written(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else describe(value)


def _listed(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
