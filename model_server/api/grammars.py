"""Reads the fields of a request for structured output, and returns the grammar of its answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from model_server.api.validation import check_unicode
from model_server.errors import BadRequest
from model_server.text.grammar import GrammarKind, GrammarSpec

Given = tuple[GrammarKind, Any, str]
"""The kind of a grammar, its value, and how the client wrote the field's name."""


def one_grammar(given: Iterable[Given]) -> GrammarSpec | None:
    """Return the grammar of a request, not compiled, or None without one.

    Raises:
        BadRequest: there are several, or it is malformed.
    """
    found = list(given)
    if len(found) > 1:
        labels = " and ".join(label for _, _, label in found)
        raise BadRequest(f"{labels} each set the form of the answer: send only one of them.", field=found[0][2])
    for kind, value, label in found:
        if kind is GrammarKind.JSON_SCHEMA:
            spec = GrammarSpec.json_schema(value, label)
        elif kind is GrammarKind.CHOICE:
            spec = GrammarSpec.choice(value, label)
        else:
            spec = GrammarSpec(kind, value, label)
        check_unicode(spec.source, label)
        return spec
    return None


def given_grammars(values: Mapping[str, Any], labels: Mapping[str, str]) -> Iterable[Given]:
    """Yield the grammars among the values of fields that are named as their kinds."""
    for kind in GrammarKind:
        if values.get(kind) is not None:
            yield kind, values[kind], labels.get(kind, kind.value)
