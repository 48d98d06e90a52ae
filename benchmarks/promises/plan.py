"""How much is measured: the same for every promise, smaller for a look."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import checkpoint


@dataclass(frozen=True)
class Plan:
    shape: str = "100m"
    prompt_tokens: int = 64
    max_new_tokens: int = 64
    repeats: int = 3
    window_s: float = 6
    """How long one load is watched before it is changed."""
    soak_minutes: float = 20

    def model_dir(self, dtype: str = "bfloat16") -> Path:
        return checkpoint(self.shape, dtype)


QUICK = dataclasses.replace(Plan(), shape="tiny", repeats=1, window_s=1.5)
