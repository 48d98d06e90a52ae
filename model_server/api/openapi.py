"""The document at `/openapi.json`: every route's bodies, answers and errors, from the tables that the code obeys.

FastAPI writes what it can see of the routes; the rest is added here: the body of predict from `parameter_table.py`,
the refusals from the tree of `errors.py`, the keys. What bears on several fields at once a schema cannot say: such a
body fits it and is a 400.
"""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from model_server import errors
from model_server.api.fields import Schema
from model_server.api.middleware import EVENT_STREAM, OPENAI_ROOT
from model_server.api.openai.schema import ASKS_FOR_NOTHING, LABELS, Body, ChatBody, CompletionBody
from model_server.api.parameter_table import ALIASES, BY_NAME, TABLE
from model_server.api.predict import MAX_SEQUENCES
from model_server.errors import ServeError

ANY_REQUEST = (errors.BadRequest, errors.BodyTooLarge, errors.HeadersTooLarge, errors.InternalError)
"""What the layers around every route may answer."""
GENERATION = (errors.TooSlow, errors.QueueFull, errors.Unavailable)


def _object(properties: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _parameters() -> dict[str, Schema]:
    def described(schema: Schema, text: str) -> Schema:
        return {"anyOf": [schema, {"type": "null"}], "description": text}

    table = {p.name: described(p.kind.schema, f"{p.meaning}; default: {p.default}") for p in TABLE}
    aliases = {
        alias: described(BY_NAME[name].kind.schema, f"another name for {name}") for alias, name in ALIASES.items()
    }
    return table | aliases


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_MESSAGE = _object(
    {
        "role": {"type": "string", "minLength": 1, "maxLength": 64},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]},
    },
    "role",
    "content",
)
_TEXT = {"type": "string", "minLength": 1}
_ONE_OF_TWO = [_reference("PredictPrompt"), _reference("PredictMessages")]
_PREDICTION = _object(
    {
        "generated_text": {"type": "string"},
        "finish_reason": {"enum": ["stop", "length"]},
        "prompt_tokens": {"type": "integer", "minimum": 1},
        "completion_tokens": {"type": "integer", "minimum": 0},
    },
    "generated_text",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
)


def _schemas() -> dict[str, Schema]:
    parameters = _parameters()
    return {
        "PredictPrompt": _object({"prompt": _TEXT, **parameters}, "prompt"),
        "PredictMessages": _object(
            {"messages": {"type": "array", "items": _MESSAGE, "minItems": 1}, **parameters}, "messages"
        ),
        "PredictInstances": _object(
            {
                "instances": {
                    "type": "array",
                    "items": {"anyOf": [_TEXT, *_ONE_OF_TWO]},
                    "minItems": 1,
                    "maxItems": MAX_SEQUENCES,
                },
                "parameters": {"anyOf": [_object(parameters), {"type": "null"}]},
            },
            "instances",
        ),
        "Predictions": _object({"predictions": {"type": "array", "items": _PREDICTION}}, "predictions"),
        "Error": _object(
            {
                "error": {"type": "string", "description": "one sentence for people"},
                "code": {"enum": sorted({cls.code for cls in _tree(ServeError)})},
            },
            "error",
            "code",
        ),
        "OpenAIError": _object(
            {
                "error": _object(
                    {
                        "message": {"type": "string"},
                        "type": {"type": "string"},
                        "param": {"type": ["string", "null"]},
                        "code": {"enum": sorted({cls.code for cls in _tree(ServeError)})},
                    },
                    "message",
                    "type",
                    "param",
                    "code",
                )
            },
            "error",
        ),
    }


PREDICT: dict[str, Any] = {
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"anyOf": [*_ONE_OF_TWO, _reference("PredictInstances")]}}},
        }
    },
    "responses": {
        200: {
            "description": "The answers; with `stream` its events, or bare text for who accepts text/plain.",
            "content": {
                "application/json": {"schema": _reference("Predictions")},
                EVENT_STREAM: {"schema": {}},
                "text/plain": {"schema": {"type": "string"}},
            },
        }
    },
}
"""What the decorator of the predict route says to the document."""

_GENERATED: dict[int | str, Any] = {
    200: {
        "description": "The answer as OpenAI writes it; with `stream` its chunks.",
        "content": {"application/json": {"schema": {"type": "object"}}, EVENT_STREAM: {"schema": {}}},
    }
}


def openai_body(kind: type[Body]) -> dict[str, Any]:
    """Return what the decorator of an OpenAI route says to the document."""
    content = {"application/json": {"schema": _reference(kind.__name__)}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}, "responses": _GENERATED}


def _openai_schemas(model_name: str) -> dict[str, Schema]:
    """Return the bodies of OpenAI's API, with what is taken and dropped: null, labels, values that ask for nothing."""
    kinds: tuple[type[Body], ...] = (CompletionBody, ChatBody)
    _, found = models_json_schema([(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}")
    schemas = found["$defs"]
    for kind in kinds:
        properties = schemas[kind.__name__]["properties"]
        for name in properties.keys() - set(schemas[kind.__name__]["required"]):
            properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
        properties |= {name: {"enum": [*values, None]} for name, values in ASKS_FOR_NOTHING.items()}
        properties |= {name: {} for name in LABELS} | {"model": {"enum": [model_name]}}
    return schemas


METRICS: dict[str, Any] = {
    "responses": {
        200: {
            "description": "Every series, in the format that the scraper asks for.",
            "content": {
                "text/plain": {"schema": {"type": "string"}},
                "application/openmetrics-text": {"schema": {"type": "string"}},
            },
        }
    },
}


def describe(app: FastAPI, model_name: str, *, free: frozenset[str], keyed: bool) -> None:
    """Have the app tell the truth about the routes it has by now."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary="One Mistral model, by KServe's V1 protocol and by OpenAI's.",
        routes=app.routes,
    )
    components = document.setdefault("components", {})
    written = components.get("schemas", {})
    for ours in ("HTTPValidationError", "ValidationError"):  # FastAPI's own refusals: here bodies are read otherwise
        written.pop(ours, None)
    components["schemas"] = written | _schemas() | _openai_schemas(model_name)
    if keyed:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "apiKey": {"type": "http", "scheme": "api-key"},
        }
    for path, operations in document["paths"].items():
        real_path = path.replace("{model_name}", model_name)
        needs_key = keyed and real_path not in free
        for method, operation in operations.items():
            refusals: list[type[ServeError]] = [*ANY_REQUEST]
            if needs_key:
                refusals.append(errors.Unauthorized)
                operation["security"] = [{"bearer": []}, {"apiKey": []}]
            if real_path != path or path.startswith(OPENAI_ROOT):
                refusals.append(errors.UnknownModel)
            if method == "post":
                refusals += GENERATION
            elif real_path in free:
                refusals.append(errors.Unavailable)
            schema = _reference("OpenAIError" if path.startswith(OPENAI_ROOT) else "Error")
            operation["responses"].pop("422", None)
            operation["responses"].update({str(cls.status): _refusal(cls, schema) for cls in refusals})
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = {"enum": [model_name]}  # the only one there is
    app.openapi = lambda: document  # type: ignore[method-assign]


def _refusal(cls: type[ServeError], schema: Schema) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": f"{HTTPStatus(cls.status).phrase}: {', '.join(sorted({c.code for c in _tree(cls)}))}",
        "content": {"application/json": {"schema": schema}},
    }
    headers = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}
    if cls.status in headers:
        response["headers"] = {headers[cls.status]: {"schema": {"type": "string"}, "required": cls.status != 429}}
    return response


def _tree(cls: type[ServeError]) -> Iterator[type[ServeError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _tree(child)
