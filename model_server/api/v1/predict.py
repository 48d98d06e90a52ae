"""KServe's V1 predict on the wire, inbound: a body in, `Request`s out.

`parse` accepts the three bodies (prompt, messages, instances) and leaves nothing to check later. How answers are
written is in `predictions.py`. Knows nothing of HTTP, KServe or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field

from model_server.api.prompts import (
    Call,
    ServedModel,
    check_messages,
    encode_messages,
    encode_prompt,
    nth_seed,
)
from model_server.api.tools.messages import Message, conversation
from model_server.api.tools.schema import ToolFields
from model_server.api.tools.use import ToolUse, tool_use
from model_server.api.v1.parameter_rules import Parameters, parse_parameters
from model_server.api.v1.parameters import GenerateParameters
from model_server.api.validation import describe, printable, validate
from model_server.errors import BadRequest
from model_server.request import Request

MAX_SEQUENCES = 32
"""Answers of one call, all instances together."""

_FORMS = ("prompt", "messages", "instances")


class PredictPrompt(GenerateParameters):
    """A body with a prompt."""

    prompt: str = Field(min_length=1)


class PredictMessages(GenerateParameters, ToolFields):
    """A body with a conversation, and the tools that the answer may call."""

    messages: list[Message] = Field(min_length=1)


class PredictInstances(BaseModel):
    """KServe's form: several prompts or conversations, and the parameters that they share."""

    model_config = ConfigDict(extra="forbid")
    instances: list[Annotated[str, Field(min_length=1)] | PredictPrompt | PredictMessages] = Field(
        min_length=1, max_length=MAX_SEQUENCES
    )
    parameters: GenerateParameters | None = None


class _Messages(BaseModel):
    messages: list[Message]


@dataclass(frozen=True, eq=False, kw_only=True)
class PredictCall(Call):
    """The requests of one predict call."""

    prompts: tuple[str, ...]
    """For each request, what stands before its text: the prompt with `return_full_text`, else ''."""
    calls_tools: bool = False
    """An answer may have tool calls."""


def parse_json(body: bytes) -> object:
    """Return the body's value; JSON to the letter, so no NaN, no bad UTF-8, no endless nesting."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The body must be valid JSON: {error}.", field="body") from None


def parse(body: object, model: ServedModel, request_id: str = "", deadline_s: float | None = None) -> PredictCall:
    """Turn a body into requests that cannot be invalid.

    Raises:
        BadRequest: the sentence names the field.
    """
    prompts = _prompts(body, model)
    streams = any(prompt.parameters.values.stream for prompt in prompts)
    _check_sequences(prompts, streams)
    group = object()
    requests, texts_before = [], []
    for prompt in prompts:
        full_text, ids = prompt.encode(model)
        sampling = prompt.parameters.sampling_for(len(ids), prompt.label)
        tools, grammar = prompt.tools, prompt.parameters.grammar
        if tools is not None:
            sampling = replace(sampling, generate=tools.generate(sampling.generate))
        for index in range(prompt.parameters.num_requests):
            requests.append(
                Request(
                    prompt_ids=ids,
                    sampling=replace(sampling, seed=nth_seed(sampling.seed, index)),
                    detokenizers=[
                        tools.detokenizer(model, sampling.stop) if tools else model.text.stream(sampling.stop)
                        for _ in range(sampling.num_choices)
                    ],
                    matcher=tools.matcher(model, grammar) if tools else model.matcher(grammar),
                    group=group,
                    counts_prompt=index == 0,
                    request_id=request_id,
                    deadline_s=deadline_s,
                )
            )
            texts_before.append(full_text if prompt.parameters.values.return_full_text else "")
    return PredictCall(
        requests=tuple(requests),
        prompts=tuple(texts_before),
        stream=streams,
        calls_tools=any(prompt.tools for prompt in prompts),
    )


@dataclass(frozen=True)
class _Prompt:
    """One prompt or conversation with its parameters, not yet tokens."""

    content: str | list[dict[str, Any]]
    parameters: Parameters
    label: str
    tools: ToolUse | None = None

    def encode(self, model: ServedModel) -> tuple[str, list[int]]:
        if isinstance(self.content, str):
            return self.content, encode_prompt(self.content, model, self.label)
        return encode_messages(self.content, model, self.label, self.tools.definitions if self.tools else ())


def _prompts(body: object, model: ServedModel) -> list[_Prompt]:
    if not isinstance(body, Mapping):
        raise BadRequest(f"The body must be a JSON object, not {describe(body)}.", field="body")
    forms = [form for form in _FORMS if form in body]
    if len(forms) != 1:
        found = " and ".join(forms) or "none of them"
        raise BadRequest(
            f'The body must have one of "prompt", "messages" and "instances"; it has {found}.', field="body"
        )
    if forms != ["instances"]:
        return [_prompt(body, model, "", {})]
    for name in body:
        if name not in ("instances", "parameters"):
            label = printable(name)
            raise BadRequest(
                f'{label} must not stand beside "instances": put it into "parameters" or into an instance.',
                field=label,
            )
    instances, shared = body["instances"], body.get("parameters")
    if not isinstance(instances, list) or not 1 <= len(instances) <= MAX_SEQUENCES:
        raise BadRequest(
            f"instances must be a list of 1 to {MAX_SEQUENCES}, not {describe(instances)}.", field="instances"
        )
    if shared is not None and not isinstance(shared, Mapping):
        raise BadRequest(f"parameters must be an object, not {describe(shared)}.", field="parameters")
    prompts = []
    for i, instance in enumerate(instances):
        if isinstance(instance, str):
            instance = {"prompt": instance}
        if not isinstance(instance, Mapping) or ("prompt" in instance) == ("messages" in instance):
            raise BadRequest(
                f'instances[{i}] must be a string, or an object with either "prompt" or "messages".',
                field="instances",
            )
        prompts.append(_prompt(instance, model, f"instances[{i}].", shared or {}))
    return prompts


def check_prompt(value: object, label: str) -> str:
    """Return a prompt that is text.

    Raises:
        BadRequest: it is not.
    """
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{label} must be a string that is not empty, not {describe(value)}.", field=label)
    return value


def _prompt(fields: Mapping[str, Any], model: ServedModel, where: str, shared: Mapping[str, Any]) -> _Prompt:
    name = "prompt" if "prompt" in fields else "messages"
    label = where + name
    content = fields[name]
    if name == "messages":
        check_messages(content, model, label)
        content = conversation(validate(_Messages, {"messages": content}, {"messages": label}).messages, label)
    else:
        content = check_prompt(content, label)
    of_tools = {field: fields[field] for field in ToolFields.model_fields if fields.get(field) is not None}
    parameters = {field: value for field, value in fields.items() if field not in (name, *ToolFields.model_fields)}
    parsed = parse_parameters(parameters, model.limits, where=where, base=shared)
    return _Prompt(content, parsed, label, _tools(of_tools, parsed, model, where, name))


def _tools(
    given: Mapping[str, Any], parameters: Parameters, model: ServedModel, where: str, form: str
) -> ToolUse | None:
    if form == "prompt":
        for field in given:
            raise BadRequest(f"{where}{field} needs messages, not a prompt.", field=where + field)
    tools = tool_use(validate(ToolFields, given, {field: where + field for field in given}), model, where)
    if tools is not None and "eos_token_id" in parameters.generate:
        field = parameters.labels["eos_token_id"]
        raise BadRequest(f"{field} does not work with tools, which say where the text ends.", field=field)
    return tools


def _check_sequences(prompts: list[_Prompt], streams: bool) -> None:
    total = sum(prompt.parameters.values.num_return_sequences for prompt in prompts)
    if total > MAX_SEQUENCES:
        raise BadRequest(
            f"num_return_sequences times the instances must be at most {MAX_SEQUENCES}, not {total}.",
            field="num_return_sequences",
        )
    if streams and total > 1:
        raise BadRequest(
            f"stream must be false for more than one answer; instances and num_return_sequences ask for {total}.",
            field="stream",
        )
    if streams and prompts[0].parameters.values.num_beams > 1:
        raise BadRequest("stream must be false with num_beams above 1: all beams end at once.", field="stream")
