"""The queue of requests: fair between HTTP calls, first come first served within one."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from model_server.request import Request


class FairQueue:
    """Requests in groups, one group for each HTTP call. Groups take turns."""

    def __init__(self) -> None:
        self._groups: OrderedDict[object, deque[Request]] = OrderedDict()
        self._length = 0
        """Counted, not summed up: metrics read the length while another thread changes the queue."""

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        for requests in self._groups.values():
            yield from requests

    def append(self, request: Request) -> None:
        self._groups.setdefault(request.group, deque()).append(request)
        self._length += 1

    def pop(
        self,
        is_allowed: Callable[[object], bool] = lambda group: True,
        fits: Callable[[Request], bool] = lambda request: True,
    ) -> Request | None:
        """Remove and return the next request of the first group that is allowed; the group goes to the end.

        Return None if no group is allowed, or if that request does not fit.
        """
        for group, requests in self._groups.items():
            if is_allowed(group):
                if not fits(requests[0]):
                    return None
                request = requests.popleft()
                self._length -= 1
                if requests:
                    self._groups.move_to_end(group)
                else:
                    del self._groups[group]
                return request
        return None

    def remove_where(self, condition: Callable[[Request], bool]) -> list[Request]:
        """Remove and return the requests for which the condition holds."""
        removed = []
        for group, requests in list(self._groups.items()):
            matching = [r for r in requests if condition(r)]
            if matching:
                removed += matching
                self._length -= len(matching)
                kept = deque(r for r in requests if r not in matching)
                if kept:
                    self._groups[group] = kept
                else:
                    del self._groups[group]
        return removed
