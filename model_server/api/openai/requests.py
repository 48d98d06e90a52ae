"""OpenAI's API on the wire, inbound: the body of a completion or a chat in, `Request`s out.

What a body may hold is in `schema.py`, how answers are written in `responses.py`. Knows nothing of HTTP,
KServe or torch.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from model_server.api.openai.schema import MAX_CHOICES, Body, ChatBody, ChatMessage, CompletionBody, as_param, read
from model_server.api.openai.structured_output import matchers
from model_server.api.prompts import (
    Call,
    ServedModel,
    Text,
    check_messages,
    encode_messages,
    encode_prompt,
    nth_seed,
    room_after,
)
from model_server.api.tools.messages import conversation
from model_server.api.tools.use import ToolUse, tool_use
from model_server.api.v1.parameter_rules import MIN_TEMPERATURE
from model_server.api.validation import describe, printable
from model_server.errors import BadRequest, UnknownModel
from model_server.request import Request, SamplingParams


@dataclass(frozen=True, eq=False, kw_only=True)
class OpenAICall(Call):
    """One call: its requests in the order of the choices, and what the answer must say besides their text."""

    model: str
    chat: bool
    text: Text
    echoes: tuple[str, ...]
    """For each choice, the prompt that stands before its text, or ''."""
    num_prompt_tokens: int
    """Of all prompts, each counted once however many choices it has."""
    n: int = 1
    """Choices of each prompt."""
    include_usage: bool = False
    logprobs: bool = False
    only_echo: bool = False
    """`max_tokens: 0`: the answer is the prompt and nothing more."""
    id: str = field(default_factory=lambda: f"{random.getrandbits(128):032x}")
    created_s: int = field(default_factory=lambda: int(time.time()))


def parse_completion(
    payload: object, model: ServedModel, request_id: str = "", deadline_s: float | None = None
) -> OpenAICall:
    """Turn the body of a completion into requests that cannot be invalid.

    Raises:
        ServeError: the sentence names the field.
    """
    body = read(CompletionBody, payload)
    check_model(body.model, model)
    if body.best_of not in (None, body.n):
        raise BadRequest(
            f"best_of must be n ({body.n}) or absent: this server does not compare answers.", field="best_of"
        )
    if body.max_tokens == 0 and not body.echo:
        raise BadRequest("max_tokens must be at least 1 without echo.", field="max_tokens")
    given = _prompts(body.prompt)
    if len(given) * body.n > MAX_CHOICES:
        raise BadRequest(f"n times the prompts must be at most {MAX_CHOICES}, not {len(given) * body.n}.", field="n")
    prompts = [_completion_prompt(prompt, model) for prompt in given]
    return OpenAICall(
        model=model.name,
        chat=False,
        text=model.text,
        requests=_requests(
            body,
            [ids for _, ids in prompts],
            model,
            max_tokens=body.max_tokens,
            name="prompt",
            num_top=body.logprobs,
            prompt_logprobs=body.echo and body.logprobs is not None,
            request_id=request_id,
            deadline_s=deadline_s,
        ),
        echoes=tuple(prompt if body.echo else "" for prompt, _ in prompts for _ in range(body.n)),
        num_prompt_tokens=sum(len(ids) for _, ids in prompts),
        n=body.n,
        stream=body.stream,
        include_usage=_include_usage(body),
        logprobs=body.logprobs is not None,
        only_echo=body.max_tokens == 0,
    )


def parse_chat(
    payload: object, model: ServedModel, request_id: str = "", deadline_s: float | None = None
) -> OpenAICall:
    """Turn the body of a chat into requests that cannot be invalid.

    Raises:
        ServeError: the sentence names the field.
    """
    body = read(ChatBody, payload)
    check_model(body.model, model)
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise BadRequest(
            "max_tokens is the old name of max_completion_tokens: send only one of them.", field="max_tokens"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true.", field="top_logprobs")
    try:
        tools = tool_use(body, model)
    except BadRequest as error:
        raise as_param(error) from None
    definitions = tools.definitions if tools else ()
    check_messages(body.messages, model, "messages")
    _, ids = encode_messages(chat_messages(body.messages), model, "messages", definitions)
    return OpenAICall(
        model=model.name,
        chat=True,
        text=model.text,
        requests=_requests(
            body,
            [ids],
            model,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            name="messages",
            num_top=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=False,
            request_id=request_id,
            deadline_s=deadline_s,
            tools=tools,
        ),
        echoes=("",) * body.n,
        num_prompt_tokens=len(ids),
        n=body.n,
        stream=body.stream,
        include_usage=_include_usage(body),
        logprobs=body.logprobs,
    )


def models(model: ServedModel, created_s: int) -> dict[str, Any]:
    """Return the list of the one model."""
    entry = {"id": model.name, "object": "model", "created": created_s, "owned_by": "mistral-7b-kserve"}
    return {"object": "list", "data": [entry]}


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """Return the prompts one by one: a list may be several texts, one prompt's tokens, or several of those."""
    if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int)):
        return prompt  # type: ignore[return-value]
    return [prompt]


def _completion_prompt(prompt: str | list[int], model: ServedModel) -> tuple[str, list[int]]:
    """Return a prompt as text and as tokens, whichever it was given as."""
    if isinstance(prompt, str):
        return prompt, encode_prompt(prompt, model, "prompt")
    vocab_size = model.limits.vocab_size
    if not all(0 <= token_id < vocab_size for token_id in prompt):
        raise BadRequest(f"prompt must hold token ids from 0 to {vocab_size - 1}.", field="prompt")
    room_after(len(prompt), model.limits, "prompt")  # before the work of turning them into text
    return model.text.decode(prompt), prompt


def chat_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages in the form of a chat template.

    Raises:
        BadRequest: the sentence names the field.
    """
    known = []
    for i, message in enumerate(messages):
        for name, value in (message.model_extra or {}).items():
            if value not in (None, [], {}, "") and (name, message.role) != ("name", "tool"):
                raise BadRequest(f"messages[{i}].{printable(name)} is not supported here.", field="messages")
        # OpenAI's newer name for the same role; chat templates know the older.
        known.append(message.model_copy(update={"role": "system"}) if message.role == "developer" else message)
    return conversation(known, "messages")


def check_model(name: str, model: ServedModel) -> None:
    """Refuse a request for another model.

    Raises:
        UnknownModel: the name is not the served one.
    """
    if name != model.name:
        raise UnknownModel(f"There is no model {describe(name)} here; this server serves {model.name}.", field="model")


def _include_usage(body: Body) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _requests(
    body: Body,
    prompts: list[list[int]],
    model: ServedModel,
    *,
    name: str,
    max_tokens: int | None,
    num_top: int | None,
    prompt_logprobs: bool,
    request_id: str,
    deadline_s: float | None,
    tools: ToolUse | None = None,
) -> tuple[Request, ...]:
    """Return one request for each choice."""
    generate = _generate(body, model.limits.vocab_size)
    if tools is not None:
        generate = tools.generate(generate)
    group = object()
    requests: list[Request] = []
    of_answers = matchers(body, model, len(prompts) * body.n, tools)
    for ids in prompts:
        room = room_after(len(ids), model.limits, name)
        for index in range(body.n):
            sampling = SamplingParams(
                generate=generate,
                max_new_tokens=room if max_tokens is None else min(max(max_tokens, 1), room),
                seed=nth_seed(body.seed, index),
                stop=body.stops,
                logprobs=num_top,
                prompt_logprobs=prompt_logprobs,
                frequency_penalty=body.frequency_penalty,
                presence_penalty=body.presence_penalty,
            )
            detokenizer = model.text.stream(body.stops) if tools is None else tools.detokenizer(model, body.stops)
            requests.append(
                Request(
                    ids,
                    sampling,
                    [detokenizer],
                    of_answers[len(requests)],
                    group=group,
                    counts_prompt=index == 0,
                    counts_output=max_tokens != 0,
                    request_id=request_id,
                    deadline_s=deadline_s,
                )
            )
    return tuple(requests)


def _generate(body: Body, vocab_size: int) -> dict[str, Any]:
    """Return the arguments of `generate`. Top-k is off: OpenAI has none."""
    bias = []
    for written, value in body.logit_bias.items():
        # A number of more digits than any vocabulary's is not worth reading.
        token_id = int(written) if written.isascii() and written.isdigit() and len(written) < 10 else vocab_size
        if token_id >= vocab_size:
            raise BadRequest(
                f"logit_bias must have token ids from 0 to {vocab_size - 1} as its names.", field="logit_bias"
            )
        bias.append([[token_id], value])
    generate: dict[str, Any] = {"do_sample": False}
    if body.temperature >= MIN_TEMPERATURE:
        generate = {"do_sample": True, "temperature": body.temperature, "top_p": body.top_p, "top_k": 0}
    return generate | ({"sequence_bias": bias} if bias else {})
