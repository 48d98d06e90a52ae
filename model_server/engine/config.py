"""The configuration of an engine: sizes and times."""

from __future__ import annotations

from dataclasses import dataclass

from model_server.engine.idle import ONCE_AFTER_S, RELEASE_AFTER_S


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The configuration of an engine."""

    max_batch_size: int
    """Sequences that one step computes."""
    max_queue_size: int
    """Requests that may wait."""
    max_fallback_tokens: int
    """Sequences times length of one `generate` call."""
    max_prefill_tokens_per_step: int
    max_prefill_tokens_when_idle: int
    """The same while at most half of the batch decodes, for prompts that the step completes."""
    prefix_caching: bool
    stall_s: float
    """A step longer than this counts as hung."""
    compile_after_s: float = ONCE_AFTER_S
    release_memory_after_s: float = RELEASE_AFTER_S
    """How long the engine must be idle before it compiles ahead, and before it returns unused memory."""
