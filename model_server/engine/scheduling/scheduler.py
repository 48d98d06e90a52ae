"""The scheduling policy: chooses the next request to admit and the prompt tokens that the next step prefills.

- A request is admitted when the batch has room and the KV cache has memory for all its tokens, so a running sequence
  never runs out of memory. A request that does not fit blocks the queue; smaller requests that pass would starve it.
- API keys take turns, and so do the groups of one key, oldest first. A group is the requests of one HTTP call. A group
  holds at most 7/8 of the batch, so a call with 32 instances neither starves nor delays a single request.
- A step decodes every sequence whose prompt is computed. It prefills at most `max_prefill_tokens_per_step` tokens.
  Half of them go to the oldest prompt, which therefore always advances. The rest go to the shortest prompts, which
  therefore do not wait for a long one.
- While at most half of the sequences decode, a longer step delays few streams. The step then prefills up to
  `max_prefill_tokens_when_idle` tokens of prompts that it completes.

Pure Python: no tensors, no threads.
"""

from __future__ import annotations

from collections.abc import Callable, Container

from model_server.engine.scheduling.fair_queue import FairQueue
from model_server.engine.sequence import Sequence
from model_server.request import Request


class Scheduler:
    """The queue and the sequences of the batch."""

    def __init__(
        self, *, max_batch_size: int, max_prefill_tokens_per_step: int, max_prefill_tokens_when_idle: int
    ) -> None:
        self.waiting = FairQueue()
        self.sequences: list[Sequence] = []
        """The batch, oldest first."""
        self.max_batch_size = max_batch_size
        self.max_prefill_tokens_per_step = max_prefill_tokens_per_step
        self._max_prefill_tokens_when_idle = max_prefill_tokens_when_idle
        self._max_sequences_per_group = max(1, max_batch_size - max_batch_size // 8)

    @property
    def num_free(self) -> int:
        """The number of sequences that the batch has room for."""
        return self.max_batch_size - len(self.sequences)

    def next_request(self, fits: Callable[[Request], bool] = lambda request: True) -> Request | None:
        """Remove and return the request to admit next, or None."""
        counts: dict[object, int] = {}
        for sequence in self.sequences:
            counts[sequence.request.group] = counts.get(sequence.request.group, 0) + 1
        return self.waiting.pop(lambda group: counts.get(group, 0) < self._max_sequences_per_group, fits)

    def plan_prefill(self, deferred: Container[Sequence] = ()) -> list[tuple[Sequence, int]]:
        """Return the sequences to prefill in the next step and their numbers of tokens; leave out `deferred` ones."""
        prefilling = [s for s in self.sequences if not s.decoding and s not in deferred]
        if not prefilling:
            return []
        budget = self.max_prefill_tokens_per_step
        oldest = prefilling[0]
        plan = {oldest: min(oldest.num_uncomputed_tokens, (budget + 1) // 2)}
        budget -= plan[oldest]
        shortest = sorted(prefilling[1:], key=lambda s: s.num_uncomputed_tokens)
        for sequence in shortest:
            if budget == 0:
                break
            plan[sequence] = min(sequence.num_uncomputed_tokens, budget)
            budget -= plan[sequence]
        if budget:
            plan[oldest] += min(oldest.num_uncomputed_tokens - plan[oldest], budget)
        if 2 * sum(s.decoding for s in self.sequences) <= len(self.sequences):
            budget = self._max_prefill_tokens_when_idle - sum(plan.values())
            for sequence in (oldest, *shortest):
                rest = sequence.num_uncomputed_tokens - plan.get(sequence, 0)
                if rest <= budget:
                    plan[sequence] = sequence.num_uncomputed_tokens
                    budget -= rest
        return list(plan.items())
