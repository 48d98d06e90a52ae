"""Plans the drafts of a step: limits them, because the sequences without a draft wait for them too."""

from __future__ import annotations

from collections.abc import Sequence as Sized

from model_server.engine.sequence import Sequence
from model_server.engine.step import Draft

MAX_DECODE_TOKENS = {"cpu": 64, "cuda": 256}
"""The most decoded and drafted tokens of a step, by device type. Up to this number, a further token costs less than its
share of the step. Beyond it, the time of a matmul grows in proportion to its rows."""


def plan_drafts(decoding: Sized[Sequence], *, device_type: str, max_tokens: int) -> list[Draft]:
    """Return the drafts of a step's decoding sequences.

    Args:
        max_tokens: the most drafted tokens of the step; the sequences share them equally.
    """
    confident = [s for s in decoding if s.lookup is not None and s.lookup.is_confident]
    if not confident:
        return []
    max_tokens = min(max_tokens, MAX_DECODE_TOKENS.get(device_type, MAX_DECODE_TOKENS["cpu"]) - len(decoding))
    limit = max(0, max_tokens // len(confident))
    drafts = [Draft(sequence, sequence.draft(limit)) for sequence in confident]
    return [draft for draft in drafts if draft.token_ids]
