"""Prefill planning: plans the prompt chunks of a step and skips prefixes that the prefix cache holds.

A sequence looks up the prefix cache when its prefill starts, not at admission. Sequences admitted together can then use
the prefix that the first of them computes.
"""

from __future__ import annotations

from collections.abc import Iterable

from model_server.compute.kv_cache.base import KVCache
from model_server.engine.scheduling.prefix_cache import MIN_PREFIX_TOKENS, PrefixCache, common_prefix_length
from model_server.engine.scheduling.scheduler import Scheduler
from model_server.engine.sequence import Sequence, SequenceStatus
from model_server.engine.step import PrefillChunk


class PrefillPlanner:
    """Plans the prefill of each step and maintains the prefix cache."""

    def __init__(self, scheduler: Scheduler, kv_cache: KVCache, *, prefix_caching: bool) -> None:
        self._scheduler = scheduler
        self._kv_cache = kv_cache
        self._prefix_cache = PrefixCache()
        self._prefix_caching = prefix_caching

    def plan(self) -> list[PrefillChunk]:
        """Return the chunks to prefill in the next step; start the prefill of waiting sequences among them."""
        deferred: set[Sequence] = set()
        while True:
            plan = self._scheduler.plan_prefill(deferred)
            starting = [sequence for sequence, _ in plan if sequence.status is SequenceStatus.WAITING]
            if not starting:
                return [
                    PrefillChunk(s, s.num_computed_tokens, count, count == s.num_uncomputed_tokens) for s, count in plan
                ]
            for sequence in starting:
                source, length = self._match_prefix(sequence)
                prefilling = [other for other, _ in plan if other.status is SequenceStatus.PREFILLING]
                if self._is_worth_waiting(sequence, length, prefilling):
                    deferred.add(sequence)
                else:
                    self._start(sequence, source, length)

    def record(self, sequence: Sequence) -> None:
        """Insert the computed tokens of a sequence into the prefix cache."""
        if self._prefix_caching and sequence.status is not SequenceStatus.WAITING:
            self._prefix_cache.insert(sequence.kv_offset, sequence.cached_ids)

    def clear(self) -> None:
        """Empty the prefix cache; call it when the KV cache has freed its memory."""
        self._prefix_cache.clear()

    def _match_prefix(self, sequence: Sequence) -> tuple[int, int]:
        """Return the offset and length of a prompt's longest cached prefix; the length is 0 if copying does not pay."""
        if self._may_reuse(sequence):
            # The last prompt token is always computed: its logits are needed.
            source, length = self._prefix_cache.match_prefix(sequence.request.prompt_ids[:-1], sequence.kv_offset)
            if length >= MIN_PREFIX_TOKENS:
                return source, length
        return sequence.kv_offset, 0

    def _may_reuse(self, sequence: Sequence) -> bool:
        # Seeded requests compute their whole prompt: in 16 bits, other chunks round differently, but the same seed must
        # give the same text.
        sampling = sequence.request.sampling
        return self._prefix_caching and sampling.seed is None and not sampling.prompt_logprobs

    def _is_worth_waiting(self, sequence: Sequence, num_cached: int, prefilling: Iterable[Sequence]) -> bool:
        """Return whether waiting for a prefix that another sequence prefills saves at least half a step."""
        enough = num_cached + self._scheduler.max_prefill_tokens_per_step // 2
        prompt_ids = sequence.request.prompt_ids[:-1]
        return self._may_reuse(sequence) and any(
            common_prefix_length(other.request.prompt_ids, prompt_ids) >= enough for other in prefilling
        )

    def _start(self, sequence: Sequence, source: int, num_cached: int) -> None:
        sequence.start_prefill(num_cached)
        if source != sequence.kv_offset:
            self._kv_cache.copy(source, sequence.kv_offset, num_cached)
        self._prefix_cache.invalidate(sequence.kv_offset, sequence.request.max_tokens)
        self.record(sequence)
