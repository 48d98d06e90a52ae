"""The verification of guessed tokens: every token is chosen from the model's logits, as in a step without guesses."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from collections.abc import Sequence as Sized

import torch
from torch import Tensor

from model_server.compute.gpu.host_device import to_device
from model_server.engine.step import Batch, InFlightStep
from model_server.errors import ServeError
from model_server.telemetry import metrics

logger = logging.getLogger(__name__)

Tokens = Sized[int | ServeError]


def verify_drafts(
    step: InFlightStep,
    sample: Callable[[Batch, Tensor], tuple[InFlightStep, Tokens]],
    process_outputs: Callable[[InFlightStep, Tokens], None],
) -> None:
    """Give the sequences of a step further tokens, one at a time, while the latest one is the one that was guessed.

    The logits after a right guess are those of a step that computes that token alone. The keys and values of wrong
    guesses are overwritten by the next step.

    Args:
        step: its own tokens are processed.
        sample: chooses a token for each sequence; if it fails, the next step computes the tokens.
    """
    metrics.drafted_tokens_total.inc(step.batch.num_drafted)
    first = itertools.accumulate((len(draft.token_ids) for draft in step.batch.drafts), initial=0)
    right = list(zip(step.batch.drafts, first, strict=False))
    for n in itertools.count():
        right = [(draft, index) for draft, index in right if draft.is_right(n)]
        if not right:
            return
        metrics.drafted_tokens_accepted_total.inc(len(right))
        indices = to_device([index + n for _, index in right], step.drafted_logits.device, torch.long)
        try:
            following, tokens = sample(Batch([draft.sequence for draft, _ in right]), step.drafted_logits[indices])
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.warning("guessed tokens could not be verified", exc_info=True)
            return
        process_outputs(following, tokens)
        sampled = set(following.batch.sampled)  # the others sit out: the mask of their next token is late
        right = [(draft, index) for draft, index in right if draft.sequence in sampled]
