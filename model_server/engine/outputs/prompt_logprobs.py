"""Log-probabilities of prompts: computed by the step that prefills the prompt, and read with that step's tokens."""

from __future__ import annotations

from torch import Tensor

from model_server.compute.gpu.host_device import to_device
from model_server.compute.logprobs import TokenLogprobs
from model_server.engine.step import Batch, PrefillChunk
from model_server.request import PromptLogprobs, Token

PromptLogprobsInFlight = dict[PrefillChunk, TokenLogprobs | None]
"""The log-probabilities of each chunk; None if no prompt token follows the chunk."""


def launch_prompt_logprobs(batch: Batch, logits: Tensor) -> PromptLogprobsInFlight:
    """Compute the log-probabilities of the prompts whose requests ask for them.

    Args:
        logits: (tokens, vocab_size): one for each of `batch.sampled`, then those of these prompts' tokens.
    """
    launched: PromptLogprobsInFlight = {}
    index = len(batch.sampled)
    for chunk in batch.prefill:
        if chunk.sequence.request.sampling.prompt_logprobs:
            launched[chunk] = _launch(chunk, logits[index : index + chunk.num_tokens])
            index += chunk.num_tokens
    return launched


def _launch(chunk: PrefillChunk, logits: Tensor) -> TokenLogprobs | None:
    following = _following(chunk)
    if not following:
        return None
    num_top = chunk.sequence.request.sampling.logprobs or 0
    token_ids = to_device(following, logits.device)
    return TokenLogprobs(logits[: len(following)], token_ids, [num_top] * len(following))


def read_prompt_logprobs(chunk: PrefillChunk, logprobs: TokenLogprobs | None) -> PromptLogprobs:
    """Return the log-probabilities of the tokens after each token of the chunk.

    The first chunk also returns the prompt's first token, without a log-probability.
    """
    tokens = [] if logprobs is None else logprobs.read()
    if chunk.start == 0:
        tokens.insert(0, Token(chunk.sequence.request.prompt_ids[0]))
    return PromptLogprobs(tuple(tokens))


def _following(chunk: PrefillChunk) -> list[int]:
    return chunk.sequence.request.prompt_ids[chunk.start + 1 : chunk.start + 1 + chunk.num_tokens]
