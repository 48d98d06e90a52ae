"""What readers are told of the shared lane's tokens: text, log-probabilities, and how an answer ends.

Leaves out when (shared_lane).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model_server.compute.sampling import with_logprobs
from model_server.engine.scheduler import Sequence
from model_server.request import Finished, FinishReason, PromptLogprobs, TextDelta, Token
from model_server.telemetry import request_log


@dataclass(frozen=True, slots=True)
class PendingToken:
    """A token that a row has taken and its reader does not know of yet."""

    row: Sequence
    token_id: int
    tokens: tuple[Token, ...]
    """The same with its log-probabilities, where they are wanted."""
    reason: FinishReason | None
    """Why it is the row's last."""


def tell(untold: PendingToken) -> None:
    """Send what a token adds to its answer, and the ending if it is the last: by its row, or by a stop string."""
    row, request = untold.row, untold.row.request
    if request.channel.ended:  # by another thread, which has written its line
        return
    request_log.token(request)
    detokenizer = request.detokenizers[0]
    text = detokenizer.push(untold.token_id)
    if text or untold.tokens:
        request.channel.send(TextDelta(text, tokens=untold.tokens))
    reason = FinishReason.STOP if detokenizer.stopped else untold.reason
    if reason is not None:
        end(row, reason)


def tell_prompt_tokens(row: Sequence, count: int, logits: torch.Tensor) -> None:
    """Send the log-probabilities of the prompt tokens that follow those just read."""
    request, start = row.request, row.num_read
    following = request.prompt_ids[start + 1 : start + count + 1]
    num_top = request.sampling.logprobs or 0
    tokens = with_logprobs(logits[: len(following)], following, num_top) if following else []
    if start == 0:
        tokens.insert(0, Token(request.prompt_ids[0]))
    request.channel.send(PromptLogprobs(tuple(tokens)))


def end(row: Sequence, reason: FinishReason) -> None:
    """Send the rest of a row's text and its ending."""
    request = row.request
    detokenizer = request.detokenizers[0]
    text = detokenizer.flush()
    if text:
        request.channel.send(TextDelta(text))
    if detokenizer.stopped:  # the last of the text can complete a stop string
        reason = FinishReason.STOP
    request.channel.send(Finished(reason, request.num_prompt_tokens, len(row.answer_ids)))
    request_log.ended(request, reason.value)
