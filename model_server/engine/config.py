"""The configuration of an engine: sizes and times."""

from __future__ import annotations

from dataclasses import dataclass

from model_server.engine.idle import ONCE_AFTER_S, RELEASE_AFTER_S


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The configuration of an engine."""

    max_batch_size: int
    """The most sequences in one step."""
    max_queue_size: int
    """The most requests that wait."""
    max_fallback_tokens: int
    """The most tokens of one `generate` call: sequences times length."""
    max_prefill_tokens_per_step: int
    max_prefill_tokens_when_idle: int
    """The limit while at most half of the batch decodes, for prompts that the step completes."""
    prefix_caching: bool
    stall_s: float
    """A step that takes longer counts as hung."""
    compile_after_s: float = ONCE_AFTER_S
    release_memory_after_s: float = RELEASE_AFTER_S
    """The engine compiles after `compile_after_s` of idle time and returns memory after `release_memory_after_s`."""
