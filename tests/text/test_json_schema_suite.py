"""The official test suite of JSON schema: a schema is refused with a documented reason, or no wrong answer fits it.

The suite is not part of this repository: `git clone` json-schema-org/JSON-Schema-Test-Suite and name its directory in
JSON_SCHEMA_TEST_SUITE.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_server.errors import BadRequest, GrammarTooComplex
from model_server.text.grammar import GrammarSpec
from tests.text.test_grammar import COMPILER, EOS, TEXT, allowed

SUITE = os.environ.get("JSON_SCHEMA_TEST_SUITE")
DOCS = (Path(__file__).parents[2] / "docs" / "structured-output.md").read_text()
CHECKED_BY_SHAPE_ALONE = {"date", "date-time", "hostname", "time"}
"""Formats whose calendar, leap seconds and Punycode no grammar checks; the docs say so."""
OTHER_REASONS = (
    "is not present in a registry|oneOf constraints|Unknown format|Unsatisfiable|Expected positive integer|not disjoint"
    "|too many digits|regex for float range|regex parse error|least common multiple"
)


def cases() -> Iterator[Any]:
    if SUITE is None:
        yield pytest.param("", {}, [], marks=pytest.mark.skip(reason="JSON_SCHEMA_TEST_SUITE names no directory"))
        return
    root = Path(SUITE) / "tests" / "draft2020-12"
    for file in sorted(root.rglob("*.json")):
        for group in json.loads(file.read_text()):
            if isinstance(group["schema"], dict):
                name = f"{file.relative_to(root).with_suffix('')}: {group['description']}"
                yield pytest.param(str(file.stem), group["schema"], group["tests"], id=name)


def refusal_of(schema: dict[str, Any]) -> str:
    try:
        COMPILER.compile(GrammarSpec.json_schema(schema))
    except BadRequest as refused:
        return str(refused)
    return ""


def fits(spec: GrammarSpec, value: object) -> bool:
    """Return whether a value fits, its properties in one order or another."""
    if isinstance(value, dict) and len(value) <= 4:
        return any(fits_as_written(spec, dict(items)) for items in itertools.permutations(value.items()))
    return fits_as_written(spec, value)


def fits_as_written(spec: GrammarSpec, value: object) -> bool:
    """Return whether a value fits, written without white space, token by token, the longest first."""
    matcher, rest = COMPILER.compile(spec), json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    while rest:
        pieces = {TEXT.token_bytes(token): token for token in allowed(matcher) if token != EOS}
        piece = max((piece for piece in pieces if piece and rest.startswith(piece)), key=len, default=None)
        if piece is None:
            return False
        try:
            matcher.accept(pieces[piece])
        except GrammarTooComplex:
            return False
        rest = rest[len(piece) :]
    return EOS in allowed(matcher)


@pytest.mark.parametrize(("file", "schema", "tests"), [*cases()])
def test_a_schema_is_refused_with_a_documented_reason_or_only_right_answers_fit_it(
    file: str, schema: dict[str, Any], tests: list[dict[str, Any]]
) -> None:
    if refusal := refusal_of(schema):
        unknown = re.search(r"Unimplemented keys: (\[.*\])", refusal)
        assert unknown or re.search(OTHER_REASONS, refusal), refusal
        assert all(f"`{keyword}`" in DOCS for keyword in json.loads(unknown[1] if unknown else "[]")), refusal
        return
    spec = GrammarSpec.json_schema(schema)

    wrong = [test["data"] for test in tests if not test["valid"] and fits(spec, test["data"])]

    # U+FEFF is white space for ECMA 262 and not for Unicode, whose classes the expressions here have.
    assert file in CHECKED_BY_SHAPE_ALONE or [value for value in wrong if value != "\ufeff"] == []
    right = [test["data"] for test in tests if test["valid"] and test["data"] != 1e308]  # numbers have no exponent
    assert not right or any(fits(spec, value) for value in right)
