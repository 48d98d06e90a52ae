"""From a prompt or messages to tokens, within the model's limits. All generating routes use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from model_server.api.tools.messages import NOT_SUPPORTED, uses_tools
from model_server.api.validation import check_unicode, describe
from model_server.errors import BadRequest
from model_server.request import Detokenizer, Request
from model_server.text.grammar import GrammarCompiler, GrammarSpec, Matcher

NUM_SEEDS = 2**63
"""A seed is below this; the seeds of further answers start again at 0."""


class FullText(Detokenizer, Protocol):
    """A detokenizer of prompt and completion as one text; `text.full_text.FullTextDetokenizer` implements it."""

    prompt: str
    """The part of the prompt's text that no later token changes."""
    ids: list[int]
    """The completion's tokens so far."""


class Text(Protocol):
    """The tokenizer's interface; `text.tokenizer.Text` implements it."""

    def encode(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def vocabulary_texts(self, ids: Sequence[int]) -> list[str]: ...

    @property
    def tool_calls_id(self) -> int | None:
        """The token that begins tool calls; None if the model cannot call tools."""
        ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[str, list[int]]:
        """Return the messages and the tools as the model's chat template writes them, and the tokens of that.

        Raises:
            BadRequest: the template refuses the messages, or the model has none.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def tokenizer_json(self) -> str: ...

    def stream(self, stop: tuple[str, ...] = ()) -> Detokenizer: ...

    def full_text_stream(
        self,
        prompt_ids: Sequence[int],
        stop: tuple[str, ...] = (),
        *,
        with_prompt: bool = True,
        skip_special_tokens: bool = False,
    ) -> FullText: ...

    def full_text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def max_prompt_chars(self, num_tokens: int) -> int:
        """Return the largest number of characters that this many tokens can have."""
        ...


@dataclass(frozen=True)
class ModelLimits:
    """The limits of the served model."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ServedModel:
    """The one model of this server: its name, its tokenizer and its limits."""

    name: str
    text: Text
    limits: ModelLimits

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles grammars."""
        return GrammarCompiler(
            self.text.tokenizer_json, vocab_size=self.limits.vocab_size, eos_token_ids=self.limits.eos_token_ids
        )

    def matcher(self, grammar: GrammarSpec | None, *, wake_token_id: int | None = None) -> Matcher | None:
        """Return a matcher that restricts one answer to a grammar; None without a grammar.

        With `wake_token_id` the answer is free until that token.

        Raises:
            BadRequest: the grammar is wrong or too large.
        """
        return None if grammar is None else self.grammars.compile(grammar, wake_token_id=wake_token_id)


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """The requests of one HTTP call, in the order of the answers."""

    requests: tuple[Request, ...]
    stream: bool = False

    def cancel(self) -> None:
        """Cancel all requests."""
        for request in self.requests:
            request.cancel()


def encode_prompt(prompt: str, model: ServedModel, label: str, *, add_special_tokens: bool = True) -> list[int]:
    """Return a prompt's tokens.

    Raises:
        BadRequest: it is not Unicode, too long or empty.
    """
    check_unicode(prompt, label)
    _check_chars(len(prompt), model, label)
    return _some(model.text.encode(prompt, add_special_tokens=add_special_tokens), label)


def check_messages(value: object, model: ServedModel, label: str) -> None:
    """Refuse anything but a list of messages, and more messages than tokens fit: each takes at least one token.

    Raises:
        BadRequest: the sentence names the field.
    """
    limit = model.limits.max_model_len
    if not isinstance(value, list) or not 1 <= len(value) <= limit:
        raise BadRequest(f"{label} must be a list of 1 to {limit} messages, not {describe(value)}.", field=label)


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    model: ServedModel,
    label: str,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, list[int]]:
    """Return messages and tools as the chat template writes them, and the tokens of that.

    Raises:
        BadRequest: they are too long, or the template refuses them.
    """
    if model.text.tool_calls_id is None and uses_tools(messages):
        raise BadRequest(f"{label}: {NOT_SUPPORTED}.", field=label)
    _check_chars(sum(map(_num_chars, messages)), model, label)
    _check_chars(len(json.dumps(tools, ensure_ascii=False)) if tools else 0, model, "tools")
    try:
        prompt, ids = model.text.encode_chat(messages, tools)
    except BadRequest as error:  # it can only say "messages": name them as the client wrote it
        raise BadRequest(label + str(error).removeprefix("messages"), field=label) from None
    return prompt, _some(ids, label)


def _num_chars(message: Mapping[str, Any]) -> int:
    calls = message.get("tool_calls", ())
    return len(message["content"]) + sum(len(call["function"]["arguments"]) for call in calls)


def room_after(num_prompt_tokens: int, limits: ModelLimits, label: str) -> int:
    """Return how many tokens a prompt leaves for the completion.

    Raises:
        BadRequest: none.
    """
    if num_prompt_tokens >= limits.max_model_len:
        raise BadRequest(
            f"{label} is {num_prompt_tokens} tokens; the maximum context length is {limits.max_model_len} "
            "(prompt and completion).",
            field=label,
        )
    return limits.max_model_len - num_prompt_tokens


def nth_seed(seed: int | None, index: int) -> int | None:
    """Return the seed of the `index`-th answer to one prompt."""
    return None if seed is None else (seed + index) % NUM_SEEDS


def _check_chars(num_chars: int, model: ServedModel, label: str) -> None:
    """Refuse a text that is too long, before tokenizing it."""
    max_tokens = model.limits.max_model_len
    max_chars = model.text.max_prompt_chars(max_tokens)
    if num_chars > max_chars:
        raise BadRequest(
            f"{label} has {num_chars} characters; {max_tokens} tokens hold at most {max_chars}.", field=label
        )


def _some(ids: list[int], label: str) -> list[int]:
    if not ids:
        raise BadRequest(f"{label} must hold at least one token.", field=label)
    return ids
