"""Log-probabilities of a step: of the sampled tokens in one call for all sequences, and of prompts."""

from __future__ import annotations

from collections.abc import Sequence as Sized
from dataclasses import dataclass, replace

from torch import Tensor

from model_server.compute.host_device import to_device
from model_server.compute.sampling import with_logprobs
from model_server.engine.step import Batch, PrefillChunk
from model_server.errors import ServeError
from model_server.request import PromptLogprobs, Token


@dataclass(frozen=True, slots=True)
class StepLogprobs:
    """The log-probabilities that the requests of a step ask for."""

    of_prompts: dict[PrefillChunk, PromptLogprobs]
    of_tokens: dict[int, Token]
    """By the token's index in `Batch.sampled`."""


def step_logprobs(batch: Batch, logits: Tensor, tokens: Sized[int | ServeError]) -> StepLogprobs:
    """Return the log-probabilities of a step.

    Args:
        logits: one row for each of `batch.logit_indices`.
        tokens: the sampled tokens, one for each of `batch.sampled`.
    """
    of_prompts = {}
    index = len(tokens)
    for chunk in batch.prefill:
        if chunk.sequence.request.sampling.prompt_logprobs:
            of_prompts[chunk] = _of_prompt(chunk, logits[index : index + chunk.num_tokens])
            index += chunk.num_tokens
    return StepLogprobs(of_prompts, _of_tokens(batch, logits, tokens))


def _of_tokens(batch: Batch, logits: Tensor, tokens: Sized[int | ServeError]) -> dict[int, Token]:
    token_ids, num_top = [], {}
    for i, (sequence, token_id) in enumerate(zip(batch.sampled, tokens, strict=True)):
        limit = sequence.request.sampling.logprobs
        if limit is not None and isinstance(token_id, int):
            token_ids.append(token_id)
            num_top[i] = limit
    if not token_ids:
        return {}
    found = with_logprobs(logits[to_device(list(num_top), logits.device)], token_ids, max(num_top.values()))
    return {i: replace(token, top=token.top[: num_top[i]]) for i, token in zip(num_top, found, strict=True)}


def _of_prompt(chunk: PrefillChunk, logits: Tensor) -> PromptLogprobs:
    """Return the prompt tokens that follow those of the chunk; the prompt's first token has no log-probability."""
    request, start = chunk.sequence.request, chunk.sequence.num_computed_tokens
    following = request.prompt_ids[start + 1 : start + chunk.num_tokens + 1]
    num_top = request.sampling.logprobs or 0
    tokens = with_logprobs(logits[: len(following)], following, num_top) if following else []
    if start == 0:
        tokens.insert(0, Token(request.prompt_ids[0]))
    return PromptLogprobs(tuple(tokens))
