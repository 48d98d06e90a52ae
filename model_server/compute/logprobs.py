"""Log-probabilities of tokens and of their likeliest alternatives, for many tokens in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model_server.compute.gpu.host_device import AsyncHostCopy
from model_server.request import Token


class TokenLogprobs:
    """Log-probabilities that the device computes and copies to the host asynchronously."""

    @torch.inference_mode()
    def __init__(self, logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> None:
        """Start the computation.

        Args:
            logits: (tokens, vocab_size), before any logits processor.
            token_ids: (tokens,).
            num_top: the number of alternatives to report for each token.
        """
        self._num_top = num_top
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, token_ids[:, None])
        top_logprobs, top_ids = logprobs.topk(max(num_top), dim=-1)
        self._logprobs = AsyncHostCopy(torch.cat((chosen, top_logprobs), -1))
        self._ids = AsyncHostCopy(torch.cat((token_ids[:, None], top_ids), -1))

    def read(self) -> list[Token]:
        """Wait for the copy and return a token for each row of the logits."""
        return [
            Token(id=ids[0], logprob=logprobs[0], top=tuple(zip(ids[1 : n + 1], logprobs[1 : n + 1], strict=True)))
            for ids, logprobs, n in zip(self._ids.read(), self._logprobs.read(), self._num_top, strict=True)
        ]
