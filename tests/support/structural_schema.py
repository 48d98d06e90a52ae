"""Validates objects against a CustomResourceDefinition's schema, like an API server with strict field validation.

It supports the keywords of KServe's CRDs: types, required, enum, pattern, bounds, integer formats, unknown fields, and
the keys that make the entries of a list unique. It leaves out CEL rules and defaults, because the fields that the chart
sets have none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}
BITS = {"int32": 31, "int64": 63}


def violations(value: Any, schema: dict[str, Any], at: str = "") -> Iterator[str]:
    """Yield the errors that an API server would report for a value."""
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, int | str) or isinstance(value, bool):
            yield f"{at}: must be an integer or a string"
    elif not _has_type(value, schema.get("type")):
        yield f"{at}: must be of type {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: must be one of {schema['enum']}"
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        yield f"{at}: must match {schema['pattern']}"
    if isinstance(value, int) and not isinstance(value, bool):
        bound = 2 ** BITS.get(schema.get("format", ""), 63)
        if not max(schema.get("minimum", -bound), -bound) <= value <= min(schema.get("maximum", bound), bound - 1):
            yield f"{at}: out of bounds"
    if isinstance(value, dict):
        yield from _object_violations(value, schema, at)
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from violations(item, schema.get("items", {}), f"{at}[{i}]")
        if keys := schema.get("x-kubernetes-list-map-keys"):
            seen = [tuple(item.get(key) for key in keys) for item in value]
            yield from (f"{at}: duplicate entries for key {entry}" for entry in set(seen) if seen.count(entry) > 1)


def _has_type(value: Any, kind: str | None) -> bool:
    return kind is None or (isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)))


def _object_violations(value: dict[str, Any], schema: dict[str, Any], at: str) -> Iterator[str]:
    properties = schema.get("properties", {})
    yield from (f"{at}.{name}: required" for name in schema.get("required", []) if name not in value)
    for name, part in value.items():
        if name in properties:
            yield from violations(part, properties[name], f"{at}.{name}")
        elif isinstance(extra := schema.get("additionalProperties"), dict):
            yield from violations(part, extra, f"{at}.{name}")
        elif properties and not schema.get("x-kubernetes-preserve-unknown-fields"):
            yield f"{at}.{name}: unknown field"
