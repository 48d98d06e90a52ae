"""A step's plan: which tokens of which sequences one forward computes, and its result in flight."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Sized
from dataclasses import dataclass

from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.logprobs import TokenLogprobs
from model_server.compute.sampling import SampledTokens
from model_server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """The next tokens of one prompt."""

    sequence: Sequence
    start: int
    """The prompt tokens before it."""
    num_tokens: int
    completes_prompt: bool

    @property
    def token_range(self) -> TokenRange:
        token_ids = self.sequence.request.prompt_ids[self.start : self.start + self.num_tokens]
        return TokenRange(self.sequence.kv_offset, self.start, token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes: a token for each decoding sequence, then chunks of prompts."""

    decode: Sized[Sequence]
    prefill: Sized[PrefillChunk] = ()

    def __len__(self) -> int:
        return len(self.decode) + len(self.prefill)

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.decode, *(chunk.sequence for chunk in self.prefill)]

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token: those that decode, and those whose prompt is completed."""
        return [*self.decode, *(chunk.sequence for chunk in self.prefill if chunk.completes_prompt)]

    @property
    def logit_indices(self) -> list[int]:
        """The tokens whose logits are needed: one for each of `sampled`, then those of prompts with log-probabilities.

        Tokens are counted through `decode`, then `prefill`.
        """
        sampled = list(range(len(self.decode)))
        prompt_logprobs: list[int] = []
        end = len(self.decode)
        for chunk in self.prefill:
            start, end = end, end + chunk.num_tokens
            if chunk.sequence.request.sampling.prompt_logprobs:
                prompt_logprobs += range(start, end)
            if chunk.completes_prompt:
                sampled.append(end - 1)
        return sampled + prompt_logprobs

    def halves(self) -> tuple[Batch, Batch]:
        """Return two batches that compute the same."""
        middle = len(self) // 2
        num_decode = len(self.decode)
        return (
            Batch(self.decode[:middle], self.prefill[: max(0, middle - num_decode)]),
            Batch(self.decode[middle:], self.prefill[max(0, middle - num_decode) :]),
        )


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """A step that was launched and whose tokens the host has not read."""

    batch: Batch
    sampled: SampledTokens
    """A token for each of `batch.sampled`."""
    prompt_logprobs: Mapping[PrefillChunk, TokenLogprobs | None]
    """For each chunk whose prompt reports log-probabilities; None if no prompt token follows the chunk."""
