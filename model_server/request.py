"""A request to generate, its events, and the channel that carries the events to the reader.

The API parses a body once into valid `Request`s, the engine generates, and the reader iterates `Request.answer()`.
This module knows neither HTTP nor torch nor tokenizers.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from model_server.caller import Caller
from model_server.errors import ServeError


class FinishReason(enum.StrEnum):
    """The reason why generation ended."""

    STOP = "stop"
    """An end-of-sequence token or one of the request's stop strings."""
    LENGTH = "length"
    """A limit was reached: `max_new_tokens`, `max_length`, the context length, `max_time`, the request timeout."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to generate, validated."""

    generate: Mapping[str, Any]
    """Keyword arguments for `GenerationConfig` (`do_sample`, `temperature`, `num_beams`, ...), lengths excluded."""
    max_new_tokens: int
    """Maximum number of new tokens; prompt and new tokens together fit into `--max_model_len`."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    num_choices: int = 1
    """Sequences to return from one `generate` call; more than 1 only with beam search."""
    logprobs: int | None = None
    """Return each token's log-probability and this many of the likeliest alternatives; None returns none."""
    prompt_logprobs: bool = False
    """Return the prompt's tokens with their log-probabilities first (completions with `echo`)."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    """OpenAI's penalties on the generated tokens, in logits: -2 to 2."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token with its log-probability."""

    id: int
    logprob: float | None = None
    """Natural log of the probability under the model's raw logits; None for the first prompt token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the likeliest, best first."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice."""

    text: str
    index: int = 0
    """The choice, 0 to `num_choices` - 1."""
    tokens: tuple[Token, ...] = ()
    """The tokens since the last event, if `SamplingParams.logprobs` is set."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The prompt's tokens with their log-probabilities, before the first text."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one choice."""

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    index: int = 0


Event: TypeAlias = TextDelta | PromptLogprobs | Finished


class Detokenizer(Protocol):
    """Turns the tokens of one choice into text; `text.detokenizer.IncrementalDetokenizer` implements it."""

    stopped: bool
    """A stop string was found: no more text follows."""

    def push(self, token_id: int) -> str:
        """Return the text that this token completes, often ''."""
        ...

    def flush(self) -> str:
        """Return the text that was held back; call it after the last token."""
        ...


class TokenMatcher(Protocol):
    """The position of one sequence's answer in its grammar; `text.grammar.Matcher` implements it."""

    @property
    def field(self) -> str:
        """The request field that the grammar came in."""
        ...

    @property
    def active(self) -> bool:
        """False while every token is allowed."""
        ...

    @property
    def first_mask(self) -> bytes | None:
        """The mask of the grammar's first token, as `fill_all` writes it; None behind it or if it is not known."""
        ...

    def accept(self, token_id: int) -> None:
        """Advance by a token of the answer.

        Raises:
            ServeError: the grammar cannot go on; it ends this sequence alone.
        """
        ...

    @staticmethod
    def fill_all(matchers: Sequence[Any], address: int, num_bytes: int) -> Mapping[int, ServeError]:
        """Write the masks of several matchers of this class to memory, one behind the other; return the failures.

        A mask has one bit for each token, in little-endian 32-bit words. A failure stands under the position of its
        matcher, ends that sequence alone, and leaves its mask undefined.
        """
        ...


_ids = itertools.count(1)


@dataclass(eq=False)
class Request:
    """One prompt and its generation. Compared by identity."""

    prompt_ids: list[int]
    sampling: SamplingParams
    detokenizers: list[Detokenizer]
    """One for each choice."""
    matcher: TokenMatcher | None = None
    """Restricts the answer to a grammar. Only for requests of one choice that can be batched."""
    group: object = None
    """Requests of one HTTP call share a group; the scheduler is fair between groups."""
    caller: Caller = field(default_factory=Caller)
    """The caller; the scheduler alternates between API keys, and then between the groups of one key."""
    counts_prompt: bool = True
    """Whether `usage` counts its prompt tokens: not for a further choice of the same prompt."""
    counts_output: bool = True
    """Whether `usage` counts its generated tokens: not if the answer is the prompt alone."""
    request_id: str = ""
    """The client's `x-request-id`, or a generated one; for the log."""
    deadline_s: float | None = None
    """`time.monotonic()` at which generation ends with the tokens it has."""
    number: int = field(default_factory=lambda: next(_ids))
    """Requests are numbered in order of arrival."""
    arrived_s: float = field(default_factory=time.monotonic)
    admitted_s: float | None = None
    """`time.monotonic()` at which it left the queue."""
    first_token_s: float | None = None
    last_token_s: float = 0.0
    """`time.monotonic()` of the first and of the latest token; the engine sets them."""
    num_output_tokens: int = 0
    """Tokens sent so far, all choices together."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""

    def __post_init__(self) -> None:
        self.channel = Channel(len(self.detokenizers))
        if self.group is None:
            self.group = self

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def max_tokens(self) -> int:
        """The number of tokens, prompt included, that the KV cache must have room for."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens

    def cancel(self) -> None:
        """Cancel the request. The engine frees its KV cache before the next step."""
        self.channel.cancelled = True

    @property
    def cancelled(self) -> bool:
        return self.channel.cancelled

    def is_late(self, now_s: float) -> bool:
        """Return whether the deadline has passed."""
        return self.deadline_s is not None and now_s >= self.deadline_s

    async def answer(self) -> AsyncGenerator[Event, None]:
        """Yield the events of all choices, each choice's `Finished` last.

        Raises:
            ServeError: the request failed; no event follows.
        Leaving the iteration early, by any exception, cancels the request.
        """
        num_unfinished = len(self.detokenizers)
        try:
            while num_unfinished > 0:
                for event in await self.channel.receive():
                    if isinstance(event, ServeError):
                        raise event
                    num_unfinished -= isinstance(event, Finished)
                    yield event
        finally:
            self.cancel()


class Channel:
    """Carries events from one writer (an engine thread) to one reader (the event loop).

    The writer calls `send` for each event of a step, then has the event loop call `wake` once. A channel is finished by
    a `Finished` event for each choice, or by one error. Events sent after that are dropped.
    """

    def __init__(self, num_choices: int = 1) -> None:
        self.cancelled = False
        """Set by the reader: it reads no more events."""
        self._num_unfinished = num_choices
        self._events: deque[Event | ServeError] = deque()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def finished(self) -> bool:
        """Set by the writer: every choice has ended, or the request has failed."""
        return self._num_unfinished <= 0

    def send(self, event: Event | ServeError) -> None:
        """Append an event; the reader receives it after the next `wake`."""
        if self.finished:
            return
        if isinstance(event, Finished):
            self._num_unfinished -= 1
        elif isinstance(event, ServeError):
            self._num_unfinished = 0
        self._events.append(event)

    def wake(self) -> None:
        """Wake the reader; call it in the reader's event loop."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def receive(self) -> list[Event | ServeError]:
        """Wait for events and return all that have been sent."""
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return [self._events.popleft() for _ in range(len(self._events))]
