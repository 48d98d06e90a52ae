"""Who waits, who runs, and what the next step reads: pure Python, no tensors, no threads.

Policy, and why:
- A request is admitted when a place in the batch is free and its whole KV memory, so what runs always fits. One whose
  memory is not free is waited for: letting smaller ones pass would starve it.
- Groups (the requests of one HTTP call) take turns, oldest first, and one group may hold at most 7/8 of the places: a
  call with 32 instances can neither starve a single short one nor make it wait for a place.
- A step decodes every row that has its prompt, and reads at most `prefill_tokens` of the other rows' prompts: half of
  it for the oldest prompt, so that it always moves, the rest for the shortest, so that a short prompt need not wait
  for a long one. While no more rows decode than wait for their first token, a longer step helps more than it holds up:
  then it reads up to `whole_prompt_tokens`, of prompts that it completes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model_server.request import Request

if TYPE_CHECKING:
    from model_server.compute.sampling import SequenceSampler


@dataclass(eq=False, slots=True)
class Sequence:
    """A running request: where it is in its prompt and what it has answered."""

    request: Request
    place: int
    """Where its keys and values lie (`memory.KVMemory`)."""
    sampler: SequenceSampler
    started_s: float
    """`time.monotonic()` at admission."""
    num_read: int = 0
    """Prompt tokens whose keys and values are in memory."""
    begun: bool = False
    """Its prompt was looked up and, if need be, its reading begun."""
    answer_ids: list[int] = field(default_factory=list)
    left: bool = False
    """It has given its place back."""

    @property
    def decoding(self) -> bool:
        return self.num_read == self.request.num_prompt_tokens

    @property
    def num_unread(self) -> int:
        return self.request.num_prompt_tokens - self.num_read

    @property
    def num_written(self) -> int:
        """Tokens of a decoding row whose keys and values are in memory: all but the last one."""
        return self.request.num_prompt_tokens + len(self.answer_ids) - 1

    @property
    def num_to_come(self) -> int:
        """Tokens that its answer may still get."""
        return self.request.sampling.max_new_tokens - len(self.answer_ids)


class FairQueue:
    """Requests in line: groups take turns, within a group first come first served."""

    def __init__(self) -> None:
        self._groups: OrderedDict[object, deque[Request]] = OrderedDict()
        self._num_waiting = 0
        """Counted and not summed up: the line's length is asked for while another thread changes it."""

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        for line in self._groups.values():
            yield from line

    def add(self, request: Request) -> None:
        self._groups.setdefault(request.group, deque()).append(request)
        self._num_waiting += 1

    def pop(
        self,
        may_enter: Callable[[object], bool] = lambda group: True,
        fits: Callable[[Request], bool] = lambda request: True,
    ) -> Request | None:
        """Take the next request of the first group that may enter; the group goes to the end of the line.

        None when no group may, or when that request does not fit yet.
        """
        for group, line in self._groups.items():
            if may_enter(group):
                if not fits(line[0]):
                    return None
                request = line.popleft()
                self._num_waiting -= 1
                if line:
                    self._groups.move_to_end(group)
                else:
                    del self._groups[group]
                return request
        return None

    def remove_where(self, gone: Callable[[Request], bool]) -> list[Request]:
        """Remove and return the requests for which `gone` holds."""
        removed = []
        for group, line in list(self._groups.items()):
            leaving = [r for r in line if gone(r)]
            if leaving:
                removed += leaving
                self._num_waiting -= len(leaving)
                stay = deque(r for r in line if r not in leaving)
                if stay:
                    self._groups[group] = stay
                else:
                    del self._groups[group]
        return removed


class Scheduler:
    """The shared lane's rows and waiting requests."""

    def __init__(self, *, max_batch_size: int, prefill_tokens: int, whole_prompt_tokens: int) -> None:
        self.waiting = FairQueue()
        self.rows: list[Sequence] = []
        """Running rows, oldest first."""
        self.prefill_tokens = prefill_tokens
        self._whole_prompt_tokens = whole_prompt_tokens
        self._max_batch_size = max_batch_size
        self._max_rows_per_group = max(1, max_batch_size - max_batch_size // 8)

    @property
    def num_free(self) -> int:
        """Return how many more rows the batch may have."""
        return self._max_batch_size - len(self.rows)

    def next_request(self, fits: Callable[[Request], bool] = lambda request: True) -> Request | None:
        """Take the request that should get the next free place, or None when nobody may enter or fits yet."""
        held: dict[object, int] = {}
        for row in self.rows:
            held[row.request.group] = held.get(row.request.group, 0) + 1
        return self.waiting.pop(lambda group: held.get(group, 0) < self._max_rows_per_group, fits)

    def plan_prefill(self, waiting: Container[Sequence] = ()) -> list[tuple[Sequence, int]]:
        """Return how many prompt tokens of which rows the next step reads; rows that are `waiting` are not read."""
        reading = [row for row in self.rows if not row.decoding and row not in waiting]
        if not reading:
            return []
        budget = self.prefill_tokens
        oldest = reading[0]
        plan = {oldest: min(oldest.num_unread, (budget + 1) // 2)}
        budget -= plan[oldest]
        shortest = sorted(reading[1:], key=lambda r: r.num_unread)
        for row in shortest:
            if budget == 0:
                break
            plan[row] = min(row.num_unread, budget)
            budget -= plan[row]
        if budget:
            plan[oldest] += min(oldest.num_unread - plan[oldest], budget)
        if 2 * sum(row.decoding for row in self.rows) <= len(self.rows):
            more = self._whole_prompt_tokens - sum(plan.values())
            for row in (oldest, *shortest):
                rest = row.num_unread - plan.get(row, 0)
                if rest <= more:
                    plan[row] = row.num_unread
                    more -= rest
        return list(plan.items())


def by_arrival_desc(rows: Collection[Sequence]) -> list[Sequence]:
    """Order rows by who loses least when one must go: the newest has the least work behind it."""
    return sorted(rows, key=lambda row: row.request.number, reverse=True)
