"""The one object that travels the whole path: a `Request`, and the channel its answer comes home by.

A wire format (`predict.py`, `openai.py`) parses a body once into `Request`s that cannot be invalid; the engine
generates; the reader iterates `Request.answer()`. Owns the vocabulary, knows neither HTTP nor torch nor text.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from model_server.errors import ServeError


class Lane(enum.StrEnum):
    """Where a request is generated."""

    SHARED = "shared"
    """The step loop: one forward for all rows."""
    OWN = "own"
    """One `model.generate` call for what cannot share a step."""


class FinishReason(enum.StrEnum):
    """Why an answer ended; set once, by whoever ended it."""

    STOP = "stop"
    """An end-of-sequence token or one of the request's stop strings."""
    LENGTH = "length"
    """A limit was used up: `max_new_tokens`, `max_length`, the model's window, `max_time`, the server's time."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to generate, validated: what `generate` is told, and what we do beyond it."""

    generate: Mapping[str, Any]
    """Keyword arguments for `GenerationConfig` (`do_sample`, `temperature`, `num_beams`, ...), lengths excluded."""
    max_new_tokens: int
    """Tokens this answer may have; already cut to the room that the prompt leaves in `--max_model_len`."""
    lane: Lane = Lane.SHARED
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    num_choices: int = 1
    """Sequences wanted from one call; more than 1 only in the own lane."""
    logprobs: int | None = None
    """Report each token's log-probability and this many of the likeliest alternatives; None reports none."""
    prompt_logprobs: bool = False
    """Report the prompt's tokens the same way before the answer (completions with `echo`)."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    """OpenAI's penalties on the answer's own tokens, in logits: -2 to 2."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token with what the model thought of it."""

    id: int
    logprob: float | None = None
    """Natural log of the probability under the model's raw logits; None for the first prompt token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the likeliest, best first."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Some more of one answer."""

    text: str
    index: int = 0
    """Which answer, 0 to `num_answers` - 1."""
    tokens: tuple[Token, ...] = ()
    """The tokens since the last chunk, when `Sampling.logprobs` asks for them."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The prompt's own tokens with their log-probabilities, before the first chunk, when `prompt_logprobs` asks."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one answer."""

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    index: int = 0


Event: TypeAlias = TextDelta | PromptLogprobs | Finished


class Detokenizer(Protocol):
    """Tokens in, text out; `text.TextStream` is the real one. One per answer."""

    stopped: bool
    """A stop string was met: the rest of the answer is not wanted."""

    def push(self, token_id: int) -> str:
        """Return the text that has become certain with this token, often ''."""
        ...

    def flush(self) -> str:
        """Return what is left at the end."""
        ...


_ids = itertools.count(1)


@dataclass(eq=False)
class Request:
    """One prompt on its way to an answer. Compared by identity."""

    prompt_ids: list[int]
    sampling: SamplingParams
    detokenizers: list[Detokenizer]
    """One for each answer."""
    group: object = None
    """Requests of one HTTP call share a group; the scheduler is fair between groups."""
    request_id: str = ""
    """The caller's `x-request-id` or ours, for the log."""
    deadline_s: float | None = None
    """`time.monotonic()` after which the answer ends with what it has."""
    number: int = field(default_factory=lambda: next(_ids))
    arrived_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    last_token_s: float = 0.0
    """When tokens came, by `time.monotonic()`."""
    num_generated: int = 0
    num_cached: int = 0
    """Prompt tokens that another request had read already (`prefixes.py`)."""

    def __post_init__(self) -> None:
        self.channel = Channel(len(self.detokenizers))
        if self.group is None:
            self.group = self

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def max_tokens(self) -> int:
        """Prompt and answer together: the KV memory this request may need, in tokens."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens

    def cancel(self) -> None:
        """Stop wanting the answer. The engine frees its place before its next step."""
        self.channel.closed = True

    @property
    def cancelled(self) -> bool:
        return self.channel.closed

    async def answer(self) -> AsyncGenerator[Event, None]:
        """Yield chunks as they are made and one `Final` for each answer, then end.

        Raises:
            ServeError: the request failed; nothing follows.
        Leaving the iteration early, by any exception, cancels the request.
        """
        try:
            while True:
                for event in await self.channel.receive():
                    if isinstance(event, ServeError):
                        raise event
                    yield event
                if self.channel.finished:
                    return
        finally:
            self.cancel()


class Channel:
    """One writer (a generation thread), one reader (the event loop): events cross in batches, one wake-up each.

    The writer calls `send` and then, once for all the channels of a step, has the loop call `wake`. Every channel gets
    exactly one ending: `num_answers` `Final`s, or one error. What is sent after the ending is dropped.
    """

    def __init__(self, num_choices: int = 1) -> None:
        self.closed = False
        """The reader has gone: nobody will read what is sent."""
        self._events: deque[Event | ServeError] = deque()
        self._endings_to_send = num_choices
        self._endings_to_read = num_choices
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """The writer has sent the ending."""
        return self._endings_to_send <= 0

    @property
    def finished(self) -> bool:
        """The reader has read the ending."""
        return self._endings_to_read <= 0

    def send(self, event: Event | ServeError) -> None:
        """Append an event; the reader sees it after the next `wake`."""
        if self.ended:
            return
        self._endings_to_send -= _endings_in(event, self._endings_to_send)
        self._events.append(event)

    def wake(self) -> None:
        """Let the reader look; called in the reader's event loop."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def receive(self) -> list[Event | ServeError]:
        """Wait for events and take all there are."""
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events = [self._events.popleft() for _ in range(len(self._events))]
        for event in events:
            self._endings_to_read -= _endings_in(event, self._endings_to_read)
        return events


def _endings_in(event: Event | ServeError, open_endings: int) -> int:
    """Return how many of a channel's open endings an event settles: an error settles all of them."""
    if isinstance(event, Finished):
        return 1
    return open_endings if isinstance(event, ServeError) else 0
