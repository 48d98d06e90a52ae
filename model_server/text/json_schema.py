"""The bounds of a JSON schema that are checked before it is compiled.

llguidance bounds the rest. What is here would take it seconds, or a deep recursion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction

from model_server.errors import BadRequest

MAX_DEPTH = 50
"""Levels of objects and lists in a schema."""
MAX_PATTERN_PROPERTIES = 32
"""Expressions of `patternProperties` in a schema: each is compared with each other one."""
MAX_MULTIPLE = 10_000
"""Least common multiple of all `multipleOf`, its factors 2 and 5 aside: the states of the automaton that divides."""


def check_bounds(schema: Mapping[str, object], field: str) -> None:
    """Refuse a schema that would take seconds to compile.

    Raises:
        BadRequest: the sentence names the bound.
    """
    num_patterns, multiple = 0, 1
    for keywords in _objects(schema, field):
        patterns, divisor = keywords.get("patternProperties"), keywords.get("multipleOf")
        num_patterns += len(patterns) if isinstance(patterns, dict) else 0
        if isinstance(divisor, int | float) and math.isfinite(divisor) and divisor > 0:
            multiple = math.lcm(multiple, _without_2_and_5(Fraction(str(divisor)).numerator))
        if num_patterns > MAX_PATTERN_PROPERTIES:
            raise BadRequest(
                f"{field} has too many patternProperties; the maximum is {MAX_PATTERN_PROPERTIES}.", field=field
            )
        if multiple > MAX_MULTIPLE:
            raise BadRequest(
                f"{field}: the least common multiple of all multipleOf may be at most {MAX_MULTIPLE}, "
                "its factors 2 and 5 not counted.",
                field=field,
            )


def _objects(schema: object, field: str) -> Iterator[Mapping[str, object]]:
    """Yield every object in a schema; without recursion, since depth is bounded, too."""
    level = [schema]
    for _ in range(2 * MAX_DEPTH):
        yield from (value for value in level if isinstance(value, dict))
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise BadRequest(f"{field} is nested too deeply; the maximum is {MAX_DEPTH} levels.", field=field)


def _without_2_and_5(number: int) -> int:
    for factor in (2, 5):
        while number % factor == 0:
            number //= factor
    return number
