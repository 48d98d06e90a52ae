"""Which sequences guess tokens in the next step, and how many: a step's time is shared with those that do not."""

from __future__ import annotations

from collections.abc import Sequence as Sized

from model_server.engine.sequence import Sequence
from model_server.engine.step import Draft

MAX_DECODE_TOKENS = {"cpu": 64, "cuda": 256}
"""Decoded and guessed tokens of a step. Up to here a further token takes less time than its share of a step; beyond,
matmuls take time in proportion to their rows."""


def plan_drafts(decoding: Sized[Sequence], *, device_type: str, max_tokens: int) -> list[Draft]:
    """Return the drafts of a step's decoding sequences.

    Args:
        max_tokens: guessed tokens that the step may compute; the sequences share them equally.
    """
    confident = [s for s in decoding if s.lookup is not None and s.lookup.is_confident]
    if not confident:
        return []
    max_tokens = min(max_tokens, MAX_DECODE_TOKENS.get(device_type, MAX_DECODE_TOKENS["cpu"]) - len(decoding))
    limit = max(0, max_tokens // len(confident))
    drafts = [Draft(sequence, sequence.draft(limit)) for sequence in confident]
    return [draft for draft in drafts if draft.token_ids]
