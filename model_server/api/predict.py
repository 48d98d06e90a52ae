"""KServe's V1 predict on the wire: a body in, `Request`s out; their events in, JSON or event stream out.

`parse` accepts the three bodies (prompt, messages, instances) and leaves nothing to check later. `answer`
gathers the whole answer; `sse` and `plain_text` wait for the first event, so that a failure before it is
still an HTTP error, and return the rest as an iterator. Leaving any of them early cancels the requests.
Knows nothing of HTTP, KServe or torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import orjson

from model_server.api.fields import check_unicode, shown
from model_server.api.parameters import ModelLimits, Parameters, parse_parameters
from model_server.errors import BadRequest
from model_server.request import Detokenizer, Event, Finished, Request, TextDelta

MAX_SEQUENCES = 32
"""Answers of one call, all instances together."""

_FORMS = ("prompt", "messages", "instances")


class Text(Protocol):
    """What is needed of the tokenizer; `text.py` has the real one."""

    def encode(self, prompt: str) -> list[int]: ...

    def encode_chat(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        """Return the messages as the model's chat template writes them, and its tokens.

        Raises:
            BadRequest: the template refuses the messages, or the model has none.
        """
        ...

    def stream(self, stop: tuple[str, ...] = ()) -> Detokenizer: ...

    def max_prompt_chars(self, num_tokens: int) -> int:
        """Return how many characters can at most be in this many tokens."""
        ...


@dataclass(frozen=True, eq=False)
class Call:
    """One predict call: its requests, in the order of the answers."""

    requests: tuple[Request, ...]
    prompts: tuple[str, ...]
    """For each request, what stands before its text: the prompt with `return_full_text`, else ''."""
    stream: bool

    def cancel(self) -> None:
        """Stop wanting any of the answers."""
        for request in self.requests:
            request.cancel()


def parse_json(body: bytes) -> object:
    """Return the body's value; JSON to the letter, so no NaN, no bad UTF-8, no endless nesting."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The body must be valid JSON: {error}.", field="body") from None


def parse(body: object, text: Text, limits: ModelLimits, request_id: str = "", deadline_s: float | None = None) -> Call:
    """Turn a body into requests that cannot be invalid.

    Raises:
        BadRequest: the sentence names the field.
    """
    prompts = _prompts(body, limits)
    streams = any(prompt.parameters.stream for prompt in prompts)
    _check_sequences(prompts, streams)
    group = object()
    requests, in_front = [], []
    for prompt in prompts:
        try:
            full_text, ids = prompt.encode(text, limits.max_model_len)
            sampling = prompt.parameters.sampling_for(len(ids))
        except BadRequest as error:
            raise prompt.relabelled(error) from None
        for index in range(prompt.parameters.num_requests):
            requests.append(
                Request(
                    prompt_ids=ids,
                    sampling=replace(sampling, seed=prompt.parameters.seed_of(index)),
                    detokenizers=[text.stream(sampling.stop) for _ in range(sampling.num_choices)],
                    group=group,
                    request_id=request_id,
                    deadline_s=deadline_s,
                )
            )
            in_front.append(full_text if prompt.parameters.return_full_text else "")
    return Call(tuple(requests), tuple(in_front), streams)


@dataclass(frozen=True)
class _Prompt:
    """One prompt or chat with its parameters, not yet tokens."""

    prompt: str | None
    messages: list[dict[str, str]]
    parameters: Parameters
    where: str

    def encode(self, text: Text, max_model_len: int) -> tuple[str, list[int]]:
        name = "messages" if self.prompt is None else "prompt"
        label = self.where + name
        length = len(self.prompt or "") + sum(len(message["content"]) for message in self.messages)
        most = text.max_prompt_chars(max_model_len)
        if length > most:
            raise BadRequest(
                f"{label} has {length} characters; {max_model_len} tokens hold at most {most}.",
                field=label,
            )
        if self.prompt is None:
            full_text, ids = text.encode_chat(self.messages)
        else:
            full_text, ids = self.prompt, text.encode(self.prompt)
        if not ids:
            raise BadRequest(f"{label} must hold at least one token.", field=label)
        return full_text, ids

    def relabelled(self, error: BadRequest) -> BadRequest:
        """Name the input as the client wrote it, where others could only say 'prompt' or 'messages'."""
        if error.field not in ("prompt", "messages"):
            return error
        label = self.where + ("messages" if self.prompt is None else "prompt")
        return BadRequest(label + str(error).removeprefix(error.field), field=label)


def _prompts(body: object, limits: ModelLimits) -> list[_Prompt]:
    if not isinstance(body, Mapping):
        raise BadRequest(f"The body must be a JSON object, not {shown(body)}.", field="body")
    forms = [form for form in _FORMS if form in body]
    if len(forms) != 1:
        found = " and ".join(forms) or "none of them"
        raise BadRequest(
            f'The body must have one of "prompt", "messages" and "instances"; it has {found}.', field="body"
        )
    if forms != ["instances"]:
        return [_prompt(body, limits, "", {})]
    for name in body:
        if name not in ("instances", "parameters"):
            label = ascii(name[:64])[1:-1]
            raise BadRequest(
                f'{label} must not stand beside "instances": put it into "parameters" or into an instance.',
                field=label,
            )
    instances, shared = body["instances"], body.get("parameters")
    if not isinstance(instances, list) or not 1 <= len(instances) <= MAX_SEQUENCES:
        raise BadRequest(
            f"instances must be a list of 1 to {MAX_SEQUENCES}, not {shown(instances)}.", field="instances"
        )
    if shared is not None and not isinstance(shared, Mapping):
        raise BadRequest(f"parameters must be an object, not {shown(shared)}.", field="parameters")
    prompts = []
    for i, instance in enumerate(instances):
        if isinstance(instance, str):
            instance = {"prompt": instance}
        if not isinstance(instance, Mapping) or ("prompt" in instance) == ("messages" in instance):
            raise BadRequest(
                f'instances[{i}] must be a string, or an object with either "prompt" or "messages".',
                field="instances",
            )
        prompts.append(_prompt(instance, limits, f"instances[{i}].", shared or {}))
    return prompts


def _prompt(fields: Mapping[str, Any], limits: ModelLimits, where: str, shared: Mapping[str, Any]) -> _Prompt:
    prompt, messages = fields.get("prompt"), []
    if "prompt" in fields:
        label = f"{where}prompt"
        if not isinstance(prompt, str) or not prompt:
            raise BadRequest(f"{label} must be a string that is not empty, not {shown(prompt)}.", field=label)
        check_unicode(prompt, label)
    else:
        messages = _messages(fields["messages"], f"{where}messages", limits.max_model_len)
    parameters = {name: value for name, value in fields.items() if name not in ("prompt", "messages")}
    return _Prompt(prompt, messages, parse_parameters(parameters, limits, where=where, base=shared), where)


def _messages(value: object, label: str, most: int) -> list[dict[str, str]]:
    # Every message costs at least a token, so more of them than the model's length can never fit.
    if not isinstance(value, list) or not 1 <= len(value) <= most:
        raise BadRequest(f"{label} must be a list of 1 to {most} messages, not {shown(value)}.", field=label)
    messages = []
    for i, message in enumerate(value):
        here = f"{label}[{i}]"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise BadRequest(f'{here} must be an object with "role" and "content", and nothing else.', field=label)
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not 1 <= len(role) <= 64:
            raise BadRequest(f"{here}.role must be a string, as in user or assistant, not {shown(role)}.", field=label)
        check_unicode(role, f"{here}.role")
        messages.append({"role": role, "content": _content(content, f"{here}.content")})
    return messages


def _content(value: object, label: str) -> str:
    """Return a message's text, given as one string or as OpenAI's list of text parts."""
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    content = ""
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            rule = 'a string or a list of {"type": "text", "text": "..."}'
            raise BadRequest(f"{label} must be {rule}, not {shown(value)}.", field=label)
        content += text
    check_unicode(content, label)
    return content


def _check_sequences(prompts: list[_Prompt], streams: bool) -> None:
    total = sum(prompt.parameters.num_sequences for prompt in prompts)
    if total > MAX_SEQUENCES:
        raise BadRequest(
            f"num_return_sequences times the instances must be at most {MAX_SEQUENCES}, not {total}.",
            field="num_return_sequences",
        )
    if streams and total > 1:
        raise BadRequest(
            f"stream must be false for more than one answer; instances and num_return_sequences ask {total}.",
            field="stream",
        )
    if streams and prompts[0].parameters.generate.get("num_beams", 1) > 1:
        raise BadRequest("stream must be false with num_beams above 1: beams end all at once.", field="stream")


async def answer(call: Call) -> dict[str, list[dict[str, Any]]]:
    """Return the whole answer, a prediction for each sequence.

    Raises:
        ServeError: a request failed; the others of the call are cancelled.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            gathered = [
                tasks.create_task(_predictions(request, prompt))
                for request, prompt in zip(call.requests, call.prompts, strict=True)
            ]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    finally:
        call.cancel()
    return {"predictions": [prediction for task in gathered for prediction in task.result()]}


async def _predictions(request: Request, prompt: str) -> list[dict[str, Any]]:
    texts = [[prompt] for _ in request.detokenizers]
    predictions: list[dict[str, Any]] = [{} for _ in texts]
    async for event in request.answer():
        if isinstance(event, TextDelta):
            texts[event.index].append(event.text)
        elif isinstance(event, Finished):
            predictions[event.index] = {"generated_text": "".join(texts[event.index])} | _ending(event)
    return predictions


async def sse(call: Call) -> AsyncIterator[bytes]:
    """Wait for the first event, then return the server-sent events of a streamed call.

    Raises:
        ServeError: the request failed before its first event; nothing has been sent. A later failure is raised by
            the iterator; the layer around the routes makes it the stream's last event.
    """
    return _sse_frames(call, await _begun(call))


async def plain_text(call: Call) -> AsyncIterator[bytes]:
    """Wait for the first event, then return the bare text, piece by piece.

    Raises:
        ServeError: the request failed before its first event. A later failure is raised by the iterator: bare
            text has no place for it, so the connection must be cut for the client to see it.
    """
    return _text_pieces(call, await _begun(call))


async def _begun(call: Call) -> AsyncIterator[Event]:
    """Wait until the only request has its first event; return that and all that follow."""
    [request] = call.requests
    events = request.answer()
    first = await anext(events)

    async def all_events() -> AsyncIterator[Event]:
        yield first
        async for event in events:
            yield event

    return all_events()


async def _sse_frames(call: Call, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    try:
        if call.prompts[0]:
            yield _frame({"text": call.prompts[0]})
        async for event in events:
            if isinstance(event, Finished):
                yield _frame({"text": ""} | _ending(event))
                yield b"data: [DONE]\n\n"
            elif isinstance(event, TextDelta) and event.text:
                yield _frame({"text": event.text})
    finally:
        call.cancel()


async def _text_pieces(call: Call, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    try:
        if call.prompts[0]:
            yield call.prompts[0].encode()
        async for event in events:
            if isinstance(event, TextDelta) and event.text:
                yield event.text.encode()
    finally:
        call.cancel()


def _frame(data: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def _ending(final: Finished) -> dict[str, Any]:
    return {
        "finish_reason": final.finish_reason,
        "prompt_tokens": final.prompt_tokens,
        "completion_tokens": final.completion_tokens,
    }
