"""From `response_format` and `structured_outputs` to the grammar of an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from model_server.api.grammars import Given, given_grammars, one_grammar
from model_server.api.openai.schema import Body, ResponseFormat, as_param
from model_server.api.prompts import ServedModel
from model_server.api.tools.use import ToolUse
from model_server.errors import BadRequest
from model_server.request import TokenMatcher
from model_server.text.grammar import GrammarKind

ANY_OBJECT = {"type": "object"}


def matchers(body: Body, model: ServedModel, count: int, tools: ToolUse | None = None) -> Sequence[TokenMatcher | None]:
    """Return a matcher for each answer, by the grammar and the tools of a body; None without them.

    Raises:
        BadRequest: the grammar is wrong or too large, or the body asks for several.
    """
    try:
        grammar = one_grammar([*_response_format(body.response_format), *_structured_outputs(body)])
        if tools is not None:
            return [tools.matcher(model, grammar) for _ in range(count)]
        return [model.matcher(grammar) for _ in range(count)]
    except BadRequest as error:
        raise as_param(error) from None


def _response_format(given: ResponseFormat | None) -> Iterable[Given]:
    if given is None:
        return
    if (given.type == "json_schema") != (given.json_schema is not None):
        rule = "must be given" if given.json_schema is None else "must be left out"
        raise BadRequest(f'response_format.json_schema {rule} with type "{given.type}".', field="response_format")
    if given.json_schema is not None:
        yield GrammarKind.JSON_SCHEMA, given.json_schema.schema_, "response_format.json_schema.schema"
    elif given.type == "json_object":
        yield GrammarKind.JSON_SCHEMA, ANY_OBJECT, "response_format"


def _structured_outputs(body: Body) -> Iterable[Given]:
    if body.structured_outputs is None:
        return
    values: dict[str, Any] = body.structured_outputs.model_dump(exclude_none=True)
    if not values:
        raise BadRequest(
            "structured_outputs must have one of json, regex, choice, grammar.", field="structured_outputs"
        )
    schema = values.pop("json_", None)
    if isinstance(schema, str):
        try:
            schema = orjson.loads(schema)
        except json.JSONDecodeError as error:
            raise BadRequest(
                f"structured_outputs.json must be valid JSON: {error}.", field="structured_outputs"
            ) from None
    if schema is not None:
        yield GrammarKind.JSON_SCHEMA, schema, "structured_outputs.json"
    yield from given_grammars(values, {kind: f"structured_outputs.{kind.value}" for kind in GrammarKind})
