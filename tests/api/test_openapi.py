"""The document at `/openapi.json`: true to the code, to docs/api.md, and to what is answered to hundreds of cases."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from model_server.api import openapi
from model_server.api.http.middleware import wrap
from model_server.api.openai.endpoints import openai_router
from model_server.api.prompts import ModelLimits, ServedModel
from model_server.api.routes import TRUSS_READY_PATHS, accepts_plain_text, create_app, public_paths
from model_server.api.tokenize import tokenize_router
from model_server.api.truss import PATHS as TRUSS_PATHS
from model_server.api.truss import truss_router
from model_server.api.v1 import predict, predictions
from model_server.api.v1.parameters import ALIASES, GenerateParameters
from model_server.errors import BadRequest, ServeError
from model_server.request import Finished, FinishReason, TextDelta
from tests.support.fakes import VOCAB_SIZE, ByteText
from tests.support.malformed import MALFORMED

API_DOC = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
MODEL = ServedModel("tiny", ByteText(), ModelLimits(max_model_len=4096, vocab_size=VOCAB_SIZE, eos_token_ids=(2,)))
FREE = public_paths("tiny")


class EchoModel:
    """Reads bodies and writes answers as the real one does; between the two nothing is generated."""

    name = "tiny"
    dead = None
    degraded: list[str] = []  # noqa: RUF012

    async def healthy(self) -> bool:
        return True

    served = MODEL
    created_s = 1

    async def submit(self, parse: Any) -> Any:
        call = parse(None)
        for request in call.requests:
            for index in range(request.sampling.num_choices):
                request.channel.send(TextDelta("text", index=index))
                request.channel.send(Finished(FinishReason.LENGTH, request.num_prompt_tokens, 1, index=index))
            request.channel.wake()
        return call

    async def predict(self, payload: Any, headers: Any) -> Any:
        call = await self.submit(lambda deadline_s: predict.parse(payload, MODEL))
        if not call.stream:
            return await predictions.answer(call)
        return await (predictions.plain_text(call) if accepts_plain_text(headers) else predictions.sse(call))


def make_app(keyed: bool = False) -> Any:
    app = create_app(EchoModel())  # type: ignore[arg-type]
    app.include_router(openai_router(EchoModel()))  # type: ignore[arg-type]
    app.include_router(truss_router(EchoModel()))  # type: ignore[arg-type]
    app.include_router(tokenize_router(EchoModel()))  # type: ignore[arg-type]
    openapi.describe(app, "tiny", free=FREE, keyed=keyed)
    wrap(app, max_request_bytes=2**20, client_stall_s=30)
    return app


DOCUMENT = make_app(keyed=True).openapi()
SCHEMAS = DOCUMENT["components"]["schemas"]
BODY = Draft202012Validator(
    {
        **DOCUMENT["paths"]["/v1/models/{model_name}:predict"]["post"]["requestBody"]["content"]["application/json"][
            "schema"
        ],
        "components": DOCUMENT["components"],
    }
)
OPERATIONS = {
    (method, path): operation for path, methods in DOCUMENT["paths"].items() for method, operation in methods.items()
}


# True to the code and to the docs


def test_the_documented_routes_are_the_routes() -> None:
    rows = re.findall(r"^\| `(GET|POST) (/\S*)` \|.*\| (needed|none) \|$", API_DOC, flags=re.MULTILINE)

    assert {(method.lower(), path): key == "needed" for method, path, key in rows} == {
        route: "security" in operation for route, operation in OPERATIONS.items()
    }


def test_routes_that_need_a_key_say_401_and_the_others_do_not() -> None:
    assert {route for route, operation in OPERATIONS.items() if "401" in operation["responses"]} == {
        (method, path) for method, path in OPERATIONS if path.replace("{model_name}", "tiny") not in FREE
    }
    assert "securitySchemes" not in make_app().openapi()["components"]


def test_every_parameter_is_in_the_body_and_nothing_else() -> None:
    properties = set(SCHEMAS["PredictPrompt"]["properties"])

    assert properties == {"prompt", *ALIASES, *GenerateParameters.model_fields}


def test_every_code_word_of_the_error_tree_may_be_in_an_error() -> None:
    classes = [ServeError]
    for cls in classes:
        classes += cls.__subclasses__()

    assert set(SCHEMAS["Error"]["properties"]["code"]["enum"]) == {cls.code for cls in classes}


@pytest.mark.parametrize("example", re.findall(r'^\{"(?:prompt|messages|instances)".*\}$', API_DOC, flags=re.MULTILINE))
def test_the_examples_of_the_docs_fit(example: str) -> None:
    assert BODY.is_valid(json.loads(example))


def test_what_is_malformed_by_itself_does_not_fit() -> None:
    """What bears on several fields, on the model or on Unicode no schema can say: less than a quarter of the table."""
    fit = []
    for case in MALFORMED:
        with suppress(BadRequest):  # not JSON at all
            if BODY.is_valid(predict.parse_json(case.body)):
                fit.append(case.name)

    assert len(fit) < len(MALFORMED) / 4, fit


# True to what is answered


# One handler answers several paths: one of each is enough.
TRIED = [route for route in OPERATIONS if route[1] not in (*TRUSS_PATHS[1:], *TRUSS_READY_PATHS[1:])]
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", make_app())


@pytest.mark.parametrize(("method", "path"), TRIED)
@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_answer_is_as_described(method: str, path: str, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(GenerationMode))
    case = data.draw(SCHEMA[path][method].as_strategy(generation_mode=mode))

    case.call_and_validate(excluded_checks=[CHECKS.get_one("positive_data_acceptance")])  # type: ignore[list-item]
