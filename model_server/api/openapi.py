"""The document at `/openapi.json`: every route's bodies, answers and errors, from the models that validate them.

FastAPI writes what it can see of the routes; the rest is added here: the bodies, the errors from the tree of
`errors.py`, the keys. A schema cannot express rules that bear on several fields: a body that breaks one fits the
schema and is a 400.
"""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from model_server import errors
from model_server.api.http.middleware import OPENAI_ROOT
from model_server.api.http.streaming import EVENT_STREAM
from model_server.api.openai.response_input import IGNORED, REFUSED, ResponseBody
from model_server.api.openai.schema import IGNORED_FIELDS, NO_OP_VALUES, Body, ChatBody, CompletionBody
from model_server.api.tokenize import TOKENIZER_TAG, DetokenizeBody, TokenizeMessages, TokenizePrompt
from model_server.api.v1.parameters import ALIASES, GenerateParameters, TrussBody, Watermarking
from model_server.api.v1.predict import PredictInstances, PredictMessages, PredictPrompt
from model_server.api.v1.predictions import Predictions
from model_server.api.validation import PlainSchema, Schema
from model_server.errors import ServeError

ANY_REQUEST = (errors.BadRequest, errors.BodyTooLarge, errors.HeadersTooLarge, errors.InternalError)
"""The errors that the middleware may return on every route."""
GENERATION = (errors.TooSlow, errors.QueueFull, errors.Unavailable)


def _tree(cls: type[ServeError]) -> Iterator[type[ServeError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _tree(child)


class Error(BaseModel):
    """The error message."""

    model_config = ConfigDict(extra="forbid")
    error: str = Field(description="one sentence for people")
    code: str


class OpenAIErrorDetail(BaseModel):
    """The error in OpenAI's form."""

    model_config = ConfigDict(extra="forbid")
    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """The error object of the routes under `/openai/`."""

    model_config = ConfigDict(extra="forbid")
    error: OpenAIErrorDetail


PREDICT_BODIES = (PredictPrompt, PredictMessages, PredictInstances)
TOKENIZE_BODIES: tuple[type[BaseModel], ...] = (TokenizePrompt, TokenizeMessages, DetokenizeBody)
OPENAI_BODIES: tuple[type[Body], ...] = (CompletionBody, ChatBody)
ANSWERS = (Predictions, Error, OpenAIError)
CODES = {"enum": sorted({cls.code for cls in _tree(ServeError)})}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _schemas(model_name: str) -> dict[str, Schema]:
    """Return the schemas of all bodies and answers, with null, aliases and ignored fields."""
    bodies = (*PREDICT_BODIES, TrussBody, *OPENAI_BODIES, ResponseBody, *TOKENIZE_BODIES)
    models = [(model, "validation") for model in (*bodies, *ANSWERS)]
    _, found = models_json_schema(
        models,  # type: ignore[arg-type]
        schema_generator=PlainSchema,
        ref_template="#/components/schemas/{model}",
    )
    schemas: dict[str, Schema] = found["$defs"]
    with_parameters: tuple[type[BaseModel], ...] = (GenerateParameters, PredictPrompt, PredictMessages, TrussBody)
    for parameters in with_parameters:
        _add_aliases(schemas[parameters.__name__]["properties"])
    nullable_models: list[type[BaseModel]] = [*with_parameters, PredictInstances, Watermarking]
    nullable_models += [*OPENAI_BODIES, ResponseBody, *TOKENIZE_BODIES]
    for nullable in nullable_models:
        _accept_null(schemas[nullable.__name__])
    for body in OPENAI_BODIES:
        properties = schemas[body.__name__]["properties"]
        properties |= {name: {"enum": [*values, None]} for name, values in NO_OP_VALUES.items()}
        properties |= {name: {} for name in IGNORED_FIELDS} | {"model": {"enum": [model_name]}}
    properties = schemas["ResponseBody"]["properties"]
    properties |= {name: {"enum": [*values, None]} for name, (values, _) in REFUSED.items()}
    properties |= {name: {} for name in IGNORED} | {"model": {"enum": [model_name]}}
    for body_with_model in TOKENIZE_BODIES:
        schemas[body_with_model.__name__]["properties"]["model"] = {"enum": [model_name, None]}
    for name in ("Error", "OpenAIErrorDetail"):
        schemas[name]["properties"]["code"] = CODES
    return schemas


def _add_aliases(properties: dict[str, Schema]) -> None:
    for alias, name in ALIASES.items():
        properties[alias] = properties[name] | {"description": f"another name for {name}"}


def _accept_null(schema: Schema) -> None:
    """Let every optional property be null, which means that it is not given."""
    for name in schema["properties"].keys() - set(schema.get("required", ())):
        kept = schema["properties"][name]
        description = {"description": kept["description"]} if "description" in kept else {}
        if {"type": "null"} not in kept.get("anyOf", ()):
            schema["properties"][name] = {"anyOf": [kept, {"type": "null"}], **description}


PREDICT: dict[str, Any] = {
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"anyOf": [_reference(body.__name__) for body in PREDICT_BODIES]}}
            },
        }
    },
    "responses": {
        200: {
            "description": "The answers; with `stream` its events, or plain text with `Accept: text/plain`.",
            "content": {
                "application/json": {"schema": _reference("Predictions")},
                EVENT_STREAM: {"schema": {}},
                "text/plain": {"schema": {"type": "string"}},
            },
        }
    },
}
"""The predict route's part of the document, for its decorator."""

_GENERATED: dict[int | str, Any] = {
    200: {
        "description": "The answer as OpenAI writes it; with `stream` its chunks.",
        "content": {"application/json": {"schema": {"type": "object"}}, EVENT_STREAM: {"schema": {}}},
    }
}


def openai_body(kind: str) -> dict[str, Any]:
    """Return an OpenAI route's part of the document, for its decorator."""
    content = {"application/json": {"schema": _reference(kind)}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}, "responses": _GENERATED}


TRUSS: dict[str, Any] = {
    "openapi_extra": {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _reference("TrussBody")}}}
    },
    "responses": {
        200: {
            "description": "The prompt and its completion; with `stream` the same text in chunks.",
            "content": {
                "application/json": {"schema": {"type": "string"}},
                "application/octet-stream": {"schema": {}},
            },
        }
    },
}
"""The same for the routes of a hosted Truss."""


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
    """Make the app describe its present routes at /openapi.json."""
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
    components["schemas"] = written | _schemas(model_name)
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
            if real_path != path or path.startswith(OPENAI_ROOT) or operation.get("tags") == [TOKENIZER_TAG]:
                refusals.append(errors.UnknownModel)
            if method == "post":
                refusals += GENERATION
            elif real_path in free:
                refusals.append(errors.Unavailable)
            schema = _reference("OpenAIError" if path.startswith(OPENAI_ROOT) else "Error")
            operation["responses"].pop("422", None)
            operation["responses"].update({str(cls.status): _refusal(cls, schema) for cls in refusals})
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "model_name":
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
