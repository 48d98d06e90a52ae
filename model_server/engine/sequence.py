"""A sequence: an admitted request and its progress through prefill and decode."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model_server.engine.outputs.output import OutputWriter
from model_server.engine.prompt_lookup import PromptLookup
from model_server.request import Request

if TYPE_CHECKING:
    from model_server.compute.sequence_sampler import SequenceSampler
    from model_server.compute.token_mask import PendingMask


class SequenceStatus(enum.Enum):
    """The status of a sequence. It changes only in this order."""

    WAITING = "waiting"
    """Admitted; no token of its prompt is computed."""
    PREFILLING = "prefilling"
    """The prefix cache was looked up; part of the prompt may be computed."""
    DECODING = "decoding"
    """The whole prompt is computed; every step adds a token."""
    FINISHED = "finished"
    """Its KV cache is freed. The token that a step in flight may still compute for it is discarded."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One sequence of the batch."""

    request: Request
    kv_offset: int
    """The first position of its keys and values in the KV cache."""
    started_s: float
    """The time of its admission on the engine's clock."""
    sampler: SequenceSampler = field(init=False)
    lookup: PromptLookup | None = None
    """Drafts its next tokens, if the request asks for prompt lookup."""
    mask: PendingMask | None = None
    """The tokens that its grammar allows next; None if it has no grammar or the mask is not started."""
    mask_is_slow: bool = False
    """Whether its last mask was late or slow: its masks are then filled separately, and steps do not wait for them."""
    writer: OutputWriter = field(init=False)
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    """Prompt tokens whose keys and values are in the KV cache."""
    output_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writer = OutputWriter(self.request)

    @property
    def decoding(self) -> bool:
        return self.status is SequenceStatus.DECODING

    @property
    def finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def num_uncomputed_tokens(self) -> int:
        """The number of prompt tokens that are not yet computed."""
        return self.request.num_prompt_tokens - self.num_computed_tokens

    @property
    def kv_len(self) -> int:
        """The number of a decoding sequence's tokens in the KV cache: all but the latest."""
        return self.request.num_prompt_tokens + len(self.output_ids) - 1

    @property
    def remaining_tokens(self) -> int:
        """The number of tokens that the sequence may still generate."""
        return self.request.sampling.max_new_tokens - len(self.output_ids)

    @property
    def needs_last_token(self) -> bool:
        """Whether planning the next step needs the latest token on the host, for a grammar or a draft."""
        return self.request.matcher is not None or (self.lookup is not None and self.lookup.is_confident)

    @property
    def sits_out(self) -> bool:
        """Whether steps leave the sequence out until its mask is filled."""
        return self.mask_is_slow and self.mask is not None and not self.mask.done

    @property
    def cached_ids(self) -> list[int]:
        """The tokens whose keys and values are in the KV cache."""
        return [*self.request.prompt_ids[: self.num_computed_tokens], *self.output_ids[:-1]]

    @property
    def is_unwanted(self) -> bool:
        """Whether the client has disconnected or another thread has ended the request."""
        return self.request.cancelled or self.request.channel.finished

    def is_late(self, now_s: float) -> bool:
        """Return whether the request's deadline or its `max_time` has passed."""
        max_time_s = self.sampler.max_time_s
        return self.request.is_late(now_s) or (max_time_s is not None and now_s - self.started_s >= max_time_s)

    def start_prefill(self, num_cached_tokens: int) -> None:
        """Start the prefill after the tokens that the prefix cache has supplied."""
        self.status = SequenceStatus.PREFILLING
        self.num_computed_tokens = self.request.num_cached_tokens = num_cached_tokens

    def advance_prefill(self, num_tokens: int) -> None:
        """Record that the next `num_tokens` tokens of the prompt are computed."""
        self.num_computed_tokens += num_tokens
        if self.num_uncomputed_tokens == 0:
            self.status = SequenceStatus.DECODING

    def append(self, token_id: int) -> None:
        """Accept a sampled token.

        Raises:
            ServeError: the sequence's grammar cannot continue.
        """
        self.output_ids.append(token_id)
        self.mask = None
        if self.request.matcher is not None:
            self.request.matcher.accept(token_id)
        if self.lookup is not None:
            self.lookup.append(token_id)

    def draft(self, limit: int) -> list[int]:
        """Return up to `limit` drafted tokens, and fewer than `remaining_tokens`: the step samples one token more."""
        return [] if self.lookup is None else self.lookup.draft(min(limit, self.remaining_tokens - 1))
