"""The plan of a step (the tokens that one forward computes), and a launched step in flight."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Sized
from dataclasses import dataclass

import torch
from torch import Tensor

from model_server.compute.gpu.host_device import to_device
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.logprobs import TokenLogprobs
from model_server.compute.sampling import SampledTokens
from model_server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """The next tokens of one prompt."""

    sequence: Sequence
    start: int
    """The number of prompt tokens before the chunk."""
    num_tokens: int
    completes_prompt: bool

    @property
    def token_range(self) -> TokenRange:
        token_ids = self.sequence.request.prompt_ids[self.start : self.start + self.num_tokens]
        return TokenRange(self.sequence.kv_offset, self.start, token_ids)


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed next tokens of a decoding sequence; the step computes them after the sequence's latest token."""

    sequence: Sequence
    token_ids: Sized[int]

    @property
    def token_range(self) -> TokenRange:
        sequence = self.sequence
        return TokenRange(sequence.kv_offset, sequence.kv_len, [sequence.output_ids[-1], *self.token_ids])

    def is_right(self, index: int) -> bool:
        """Return whether the sequence has not finished and its latest token equals the drafted token at this index."""
        return (
            index < len(self.token_ids)
            and not self.sequence.finished
            and self.sequence.output_ids[-1] == self.token_ids[index]
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """The plan of one step: decoding sequences without a draft, then those with a draft, then prompt chunks."""

    decode: Sized[Sequence]
    """The decoding sequences without a draft."""
    prefill: Sized[PrefillChunk] = ()
    drafts: Sized[Draft] = ()

    def __len__(self) -> int:
        return len(self.decode) + len(self.prefill) + len(self.drafts)

    @property
    def sequences(self) -> list[Sequence]:
        drafting, prefilling = (draft.sequence for draft in self.drafts), (chunk.sequence for chunk in self.prefill)
        return [*self.decode, *drafting, *prefilling]

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token: those that decode, then those that complete their prompt."""
        completed = (chunk.sequence for chunk in self.prefill if chunk.completes_prompt)
        return [*self.decode, *(draft.sequence for draft in self.drafts), *completed]

    @property
    def ranges(self) -> list[TokenRange]:
        """The tokens of `drafts`, then those of `prefill`."""
        return [*(draft.token_range for draft in self.drafts), *(chunk.token_range for chunk in self.prefill)]

    @property
    def num_drafted(self) -> int:
        return sum(len(draft.token_ids) for draft in self.drafts)

    @property
    def logit_indices(self) -> list[int]:
        """The indices of the tokens whose logits are needed, counted through `decode` and then `ranges`.

        One for each of `sampled`, then the tokens of prompts with log-probabilities, then the drafted tokens.
        """
        sampled = list(range(len(self.decode)))
        prompt_logprobs: list[int] = []
        drafted: list[int] = []
        end = len(self.decode)
        for draft in self.drafts:
            start, end = end, end + 1 + len(draft.token_ids)
            sampled.append(start)
            drafted += range(start + 1, end)
        for chunk in self.prefill:
            start, end = end, end + chunk.num_tokens
            if chunk.sequence.request.sampling.prompt_logprobs:
                prompt_logprobs += range(start, end)
            if chunk.completes_prompt:
                sampled.append(end - 1)
        return sampled + prompt_logprobs + drafted

    def without(self, late: Collection[Sequence], logits: Tensor) -> tuple[Batch, Tensor]:
        """Return the step without the late decoding sequences, and the logits from which it samples."""
        kept = Batch(
            [s for s in self.decode if s not in late], self.prefill, [d for d in self.drafts if d.sequence not in late]
        )
        first_drafted = len(logits) - self.num_drafted
        rows = [i for i, s in enumerate(self.sampled) if s not in late]
        for draft in self.drafts:
            drafted = range(first_drafted, first_drafted + len(draft.token_ids))
            rows += drafted if draft.sequence not in late else ()
            first_drafted = drafted.stop
        return kept, logits[to_device(rows, logits.device, torch.long)]

    def halves(self) -> tuple[Batch, Batch]:
        """Return two batches that together compute this batch."""
        of_decode = len(self) // 2
        of_prefill = max(0, of_decode - len(self.decode))
        of_drafts = max(0, of_prefill - len(self.prefill))
        return (
            Batch(self.decode[:of_decode], self.prefill[:of_prefill], self.drafts[:of_drafts]),
            Batch(self.decode[of_decode:], self.prefill[of_prefill:], self.drafts[of_drafts:]),
        )


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """A launched step whose tokens the host has not read."""

    batch: Batch
    sampled: SampledTokens
    """A token for each of `batch.sampled`."""
    prompt_logprobs: Mapping[PrefillChunk, TokenLogprobs | None]
    """The log-probabilities of each chunk whose request asks for them; None if no prompt token follows the chunk."""
    drafted_logits: Tensor
    """(`batch.num_drafted`, vocab_size): the logits after each drafted token, draft by draft."""
