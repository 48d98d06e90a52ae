"""The queue of requests: fair between API keys, then between HTTP calls; first in, first out within a call."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import TypeAlias

from model_server.request import Request

Calls: TypeAlias = OrderedDict[object, deque[Request]]
"""The waiting requests of one key, by group: the requests of one HTTP call."""


class FairQueue:
    """A queue in which API keys take turns, and so do the HTTP calls of one key."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str | None, Calls] = OrderedDict()
        self._length = 0
        """A counter, because metrics read the length while another thread changes the queue."""

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        for calls in self._keys.values():
            for requests in calls.values():
                yield from requests

    def append(self, request: Request) -> None:
        calls = self._keys.setdefault(request.caller.key, OrderedDict())
        calls.setdefault(request.group, deque()).append(request)
        self._length += 1

    def pop(
        self,
        is_allowed: Callable[[object], bool] = lambda group: True,
        fits: Callable[[Request], bool] = lambda request: True,
    ) -> Request | None:
        """Remove and return the next request of the first allowed group; move its key and group to the end.

        Return None if no group is allowed, or if the request does not fit.
        """
        for key, calls in self._keys.items():
            group = next((group for group in calls if is_allowed(group)), None)
            if group is None:
                continue
            if not fits(calls[group][0]):
                return None
            request = calls[group].popleft()
            self._length -= 1
            calls.move_to_end(group)
            self._keys.move_to_end(key)
            self._discard_empty(key, group)
            return request
        return None

    def remove_where(self, condition: Callable[[Request], bool]) -> list[Request]:
        """Remove and return the requests for which the condition holds."""
        removed = []
        for key, calls in list(self._keys.items()):
            for group, requests in list(calls.items()):
                matching = [r for r in requests if condition(r)]
                if matching:
                    removed += matching
                    self._length -= len(matching)
                    calls[group] = deque(r for r in requests if r not in matching)
                    self._discard_empty(key, group)
        return removed

    def _discard_empty(self, key: str | None, group: object) -> None:
        if not self._keys[key][group]:
            del self._keys[key][group]
        if not self._keys[key]:
            del self._keys[key]
