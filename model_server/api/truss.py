"""The predict routes of a hosted Truss: its paths, and its answers as plain text, prompt included.

The body is V1's single-prompt form. The complete answer is `tokenizer.decode(output[0])` as one JSON string; a stream
has the bytes of a Truss that yields from Transformers' `TextIteratorStreamer`. Errors are this server's: a stream that
fails is cut, because plain text cannot carry an error.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from model_server.api import openapi
from model_server.api.http.streaming import Stream, after_first, cancel_on_disconnect
from model_server.api.interface import Model
from model_server.api.prompts import Call, FullText, ServedModel, encode_prompt
from model_server.api.v1.parameter_rules import parse_parameters
from model_server.api.v1.parameters import TrussParameters
from model_server.api.v1.predict import check_prompt, parse_json
from model_server.api.v1.predictions import text_pieces
from model_server.api.validation import describe
from model_server.errors import BadRequest
from model_server.request import Request as GenerateRequest

PATHS = (
    "/predict",
    "/production/predict",
    "/development/predict",
    "/environments/{environment}/predict",
    "/deployment/{deployment_id}/predict",
    "/model_versions/{version_id}/predict",
)
"""Whichever environment or version the path names, the one model answers."""
STREAM_TYPE = "application/octet-stream"


@dataclass(frozen=True, eq=False, kw_only=True)
class TrussCall(Call):
    """The one request of a call, and how its text is written."""

    model: ServedModel
    parameters: TrussParameters
    detokenizer: FullText


def parse(body: object, model: ServedModel, request_id: str = "", deadline_s: float | None = None) -> TrussCall:
    """Turn a body into a request that cannot be invalid.

    Raises:
        BadRequest: the sentence names the field.
    """
    if not isinstance(body, Mapping):
        raise BadRequest(f"The body must be a JSON object, not {describe(body)}.", field="body")
    for form in ("messages", "instances"):
        if form in body:
            rule = f"is not supported here: send prompt, or use POST /v1/models/{model.name}:predict"
            raise BadRequest(f"{form} {rule}.", field=form)
    prompt = check_prompt(body.get("prompt"), "prompt")
    fields = {name: value for name, value in body.items() if name != "prompt"}
    parameters = parse_parameters(fields, model.limits, model=TrussParameters)
    values = parameters.values
    assert isinstance(values, TrussParameters)
    if values.num_return_sequences > 1:
        rule = f"must be 1 on this route, whose answer is one text, not {values.num_return_sequences}"
        raise BadRequest(f"num_return_sequences {rule}.", field="num_return_sequences")
    if values.stream and values.num_beams > 1:
        raise BadRequest("stream must be false with num_beams above 1: all beams end at once.", field="stream")
    ids = encode_prompt(prompt, model, "prompt")
    sampling = parameters.sampling_for(len(ids))
    detokenizer = model.text.full_text_stream(
        ids,
        sampling.stop,
        with_prompt=values.return_full_text,
        skip_special_tokens=values.skip_special_tokens,
    )
    request = GenerateRequest(
        prompt_ids=ids,
        sampling=sampling,
        detokenizers=[detokenizer],
        matcher=model.matcher(parameters.grammar),
        request_id=request_id,
        deadline_s=deadline_s,
    )
    return TrussCall(requests=(request,), stream=values.stream, model=model, parameters=values, detokenizer=detokenizer)


async def answer(call: TrussCall) -> str:
    """Return the whole text.

    Raises:
        ServeError: the request failed.
    """
    [request] = call.requests
    async for _ in request.answer():
        pass
    text, skip = call.model.text, call.parameters.skip_special_tokens
    full_text = text.full_text([*request.prompt_ids, *call.detokenizer.ids], skip_special_tokens=skip)
    if call.parameters.return_full_text:
        return full_text
    return full_text[len(text.full_text(request.prompt_ids, skip_special_tokens=skip)) :]


async def pieces(call: TrussCall) -> AsyncGenerator[bytes, None]:
    """Wait for the first event, then return the text piece by piece, the prompt first.

    Raises:
        ServeError: the request failed before its first event. A later failure is raised by the iterator: the
            connection must be cut for the client to see it.
    """
    return text_pieces(call, await after_first(call.requests[0].answer()), call.detokenizer.prompt)


def gathers_stream(headers: Mapping[str, str]) -> bool:
    """Say whether a stream is wanted as one JSON string. The header must be exactly this, as for a hosted Truss."""
    return headers.get("accept") == "application/json"


def truss_router(model: Model) -> APIRouter:
    """Return the routes, to be included in the app."""
    router = APIRouter(tags=["Truss"])

    async def predict(request: Request) -> Response:
        """Generate, and answer as a hosted Truss does."""
        payload = parse_json(await request.body())
        request_id = request.headers.get("x-request-id", "")

        async def answered() -> str | AsyncGenerator[bytes, None]:
            call = await model.submit(lambda deadline_s: parse(payload, model.served, request_id, deadline_s))
            if not call.stream:
                return await answer(call)
            chunks = await pieces(call)
            if not gathers_stream(request.headers):
                return chunks
            return b"".join([chunk async for chunk in chunks]).decode()

        result = await cancel_on_disconnect(request, answered())
        return JSONResponse(result) if isinstance(result, str) else Stream(result, media_type=STREAM_TYPE)

    for path in PATHS:
        router.post(path, name="truss_predict", response_model=None, **openapi.TRUSS)(predict)
    return router
