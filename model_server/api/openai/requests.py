"""OpenAI's API on the wire, inbound: the body of a completion or a chat in, `Request`s out.

What a body may hold is in `openai_bodies.py`, how answers are written in `openai_answers.py`. Knows nothing of HTTP,
KServe or torch.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from model_server.api.fields import check_unicode, shown
from model_server.api.openai.schema import MAX_CHOICES, Body, ChatBody, CompletionBody, Message, read
from model_server.api.parameter_table import LARGEST_SEED
from model_server.api.parameters import COLDEST, ModelLimits
from model_server.api.predict import Text as PredictText
from model_server.errors import BadRequest, UnknownModel
from model_server.request import Request, SamplingParams


class Text(PredictText, Protocol):
    """What is needed of the tokenizer; `text.py` has the real one."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Call:
    """One call: its requests in the order of the choices, and what the answer must say besides their text."""

    model: str
    chat: bool
    text: Text
    requests: tuple[Request, ...]
    echoes: tuple[str, ...]
    """For each choice, the prompt that stands before its text, or ''."""
    num_prompt_tokens: int
    """Of all prompts, each counted once however many choices it has."""
    n: int = 1
    """Choices of each prompt."""
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    only_echo: bool = False
    """`max_tokens: 0`: the prompt is wanted back and nothing more."""
    id: str = field(default_factory=lambda: f"{random.getrandbits(128):032x}")
    created_s: int = field(default_factory=lambda: int(time.time()))

    def cancel(self) -> None:
        """Stop wanting any of the choices."""
        for request in self.requests:
            request.cancel()


@dataclass(frozen=True)
class Server:
    """What a body is held against: the one model here."""

    model: str
    text: Text
    limits: ModelLimits


def parse_completion(body: object, server: Server, request_id: str = "", deadline_s: float | None = None) -> Call:
    """Turn the body of a completion into requests that cannot be invalid.

    Raises:
        ServeError: the sentence names the field.
    """
    asked = read(CompletionBody, body)
    _check_model(asked.model, server)
    if asked.best_of not in (None, asked.n):
        raise BadRequest(f"best_of must be n ({asked.n}) or absent: answers are not compared here.", field="best_of")
    if asked.max_tokens == 0 and not asked.echo:
        raise BadRequest("max_tokens must be at least 1 without echo.", field="max_tokens")
    prompts = [_completion_prompt(prompt, server) for prompt in _prompts(asked.prompt)]
    return Call(
        model=server.model,
        chat=False,
        text=server.text,
        requests=_requests(
            asked,
            [ids for _, ids in prompts],
            server,
            max_tokens=max(asked.max_tokens, 1),
            name="prompt",
            num_top=asked.logprobs,
            prompt_logprobs=asked.echo and asked.logprobs is not None,
            request_id=request_id,
            deadline_s=deadline_s,
        ),
        echoes=tuple(prompt if asked.echo else "" for prompt, _ in prompts for _ in range(asked.n)),
        num_prompt_tokens=sum(len(ids) for _, ids in prompts),
        n=asked.n,
        stream=asked.stream,
        include_usage=_include_usage(asked),
        logprobs=asked.logprobs is not None,
        only_echo=asked.max_tokens == 0,
    )


def parse_chat(body: object, server: Server, request_id: str = "", deadline_s: float | None = None) -> Call:
    """Turn the body of a chat into requests that cannot be invalid.

    Raises:
        ServeError: the sentence names the field.
    """
    asked = read(ChatBody, body)
    _check_model(asked.model, server)
    if None not in (asked.max_tokens, asked.max_completion_tokens):
        raise BadRequest("max_tokens is the old name of max_completion_tokens: give one of them.", field="max_tokens")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true.", field="top_logprobs")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(asked.messages)]
    _check_length(sum(len(message["content"]) for message in messages), "messages", server)
    _, ids = server.text.encode_chat(messages)
    return Call(
        model=server.model,
        chat=True,
        text=server.text,
        requests=_requests(
            asked,
            [ids],
            server,
            max_tokens=asked.max_completion_tokens or asked.max_tokens,
            name="messages",
            num_top=(asked.top_logprobs or 0) if asked.logprobs else None,
            prompt_logprobs=False,
            request_id=request_id,
            deadline_s=deadline_s,
        ),
        echoes=("",) * asked.n,
        num_prompt_tokens=len(ids),
        n=asked.n,
        stream=asked.stream,
        include_usage=_include_usage(asked),
        logprobs=asked.logprobs,
    )


def models(server: Server, created_s: int) -> dict[str, Any]:
    """Return the list of the one model."""
    entry = {"id": server.model, "object": "model", "created": created_s, "owned_by": "mistral-7b-kserve"}
    return {"object": "list", "data": [entry]}


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """Return the prompts one by one: a list may be several texts, one prompt's tokens, or several of those."""
    if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int)):
        return prompt  # type: ignore[return-value]
    return [prompt]


def _completion_prompt(prompt: str | list[int], server: Server) -> tuple[str, list[int]]:
    """Return a prompt as text and as tokens, whichever it was given as."""
    if isinstance(prompt, str):
        _check_length(len(prompt), "prompt", server)
        ids = server.text.encode(prompt)
        if not ids:
            raise BadRequest("prompt must hold at least one token.", field="prompt")
        return prompt, ids
    vocab_size = server.limits.vocab_size
    if not all(0 <= token_id < vocab_size for token_id in prompt):
        raise BadRequest(f"prompt must hold token ids from 0 to {vocab_size - 1}.", field="prompt")
    _check_room(len(prompt), "prompt", server)  # before the work of turning them into text
    return server.text.decode(prompt), prompt


def _message(message: Message, label: str) -> dict[str, str]:
    for name, value in (message.model_extra or {}).items():
        if value not in (None, [], {}, ""):
            raise BadRequest(f"{label}.{ascii(name[:64])[1:-1]} is not supported here.", field="messages")
    parts = [message.content] if isinstance(message.content, str) else [part.text for part in message.content]
    content = "".join(parts)
    check_unicode(content, f"{label}.content")
    # OpenAI's newer name for the same role; chat templates know the older.
    return {"role": "system" if message.role == "developer" else message.role, "content": content}


def _check_model(name: str, server: Server) -> None:
    if name != server.model:
        raise UnknownModel(f"There is no model {shown(name)} here; this server serves {server.model}.", field="model")


def _check_length(num_chars: int, name: str, server: Server) -> None:
    """Refuse a text that cannot fit before the work of tokenizing it."""
    most = server.text.max_prompt_chars(server.limits.max_model_len)
    if num_chars > most:
        raise BadRequest(
            f"{name} has {num_chars} characters; {server.limits.max_model_len} tokens hold at most {most}.", field=name
        )


def _check_room(num_tokens: int, name: str, server: Server) -> int:
    """Return how many tokens the prompt leaves for the answer."""
    room = server.limits.max_model_len - num_tokens
    if room < 1:
        raise BadRequest(
            f"{name} has {num_tokens} tokens, and prompt and answer together may have "
            f"{server.limits.max_model_len}: it must have at most {server.limits.max_model_len - 1}.",
            field=name,
        )
    return room


def _include_usage(asked: Body) -> bool:
    return asked.stream_options is not None and asked.stream_options.include_usage


def _requests(
    asked: Body,
    prompts: list[list[int]],
    server: Server,
    *,
    name: str,
    max_tokens: int | None,
    num_top: int | None,
    prompt_logprobs: bool,
    request_id: str,
    deadline_s: float | None,
) -> tuple[Request, ...]:
    """Return one request for each choice."""
    if len(prompts) * asked.n > MAX_CHOICES:
        raise BadRequest(f"n times the prompts must be at most {MAX_CHOICES}, not {len(prompts) * asked.n}.", field="n")
    generate = _generate(asked, server.limits.vocab_size)
    group = object()
    requests = []
    for ids in prompts:
        room = _check_room(len(ids), name, server)
        for index in range(asked.n):
            sampling = SamplingParams(
                generate=generate,
                max_new_tokens=min(max_tokens or room, room),
                seed=None if asked.seed is None else (asked.seed + index) % (LARGEST_SEED + 1),
                stop=asked.stops,
                logprobs=num_top,
                prompt_logprobs=prompt_logprobs,
                frequency_penalty=asked.frequency_penalty,
                presence_penalty=asked.presence_penalty,
            )
            detokenizers = [server.text.stream(sampling.stop)]
            requests.append(
                Request(ids, sampling, detokenizers, group=group, request_id=request_id, deadline_s=deadline_s)
            )
    return tuple(requests)


def _generate(asked: Body, vocab_size: int) -> dict[str, Any]:
    """Return what `generate` is told. Top-k is off: OpenAI has none."""
    bias = []
    for written, value in asked.logit_bias.items():
        # A number of more digits than any vocabulary's is not worth reading.
        token_id = int(written) if written.isascii() and written.isdigit() and len(written) < 10 else vocab_size
        if token_id >= vocab_size:
            raise BadRequest(
                f"logit_bias must have token ids from 0 to {vocab_size - 1} as its names.", field="logit_bias"
            )
        bias.append([[token_id], value])
    generate: dict[str, Any] = {"do_sample": False}
    if asked.temperature >= COLDEST:
        generate = {"do_sample": True, "temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0}
    return generate | ({"sequence_bias": bias} if bias else {})
