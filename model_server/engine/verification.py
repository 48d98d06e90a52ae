"""The verification of drafted tokens: samples every token from the model's logits, as a step without drafts does."""

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
    """Sample further tokens for the sequences of a step, one at a time, while the latest token equals the drafted one.

    After a right guess, the logits equal the logits of a step that computes only that token. The next step overwrites
    the keys and values of wrong guesses.

    Args:
        step: a step whose own tokens are processed.
        sample: samples a token for each sequence; if it fails, the next step computes the tokens.
        process_outputs: appends the sampled tokens to their sequences.
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
        sampled = set(following.batch.sampled)  # the mask of the others is late
        right = [(draft, index) for draft, index in right if draft.sequence in sampled]
