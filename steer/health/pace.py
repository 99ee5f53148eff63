"""When to look at each of many starting workers: often at first, then less. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from itertools import count
from typing import Generic, TypeVar

FIRST_S, LAST_S = 0.01, 0.25
"""The first and the longest time between looks at a worker."""
_GROWS = 1.1
"""Readiness is noticed before the time since the start has grown by a tenth."""
_MOST = 0.2
"""The share of time for looks."""
T = TypeVar("T", bound=Hashable)


class Pace(Generic[T]):
    """Decides which item to look at next. Each has its own pace."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, float, T]] = []
        self._there: set[T] = set()
        self._number = count()
        self._not_before_s = 0.0

    def __len__(self) -> int:
        return len(self._there)

    def add(self, one: T, now_s: float, after_s: float = FIRST_S) -> None:
        """Add an item, unless it is there already."""
        if one not in self._there:
            self._there.add(one)
            self._push(one, now_s, after_s)

    def _push(self, one: T, now_s: float, after_s: float) -> None:
        heapq.heappush(self._due, (now_s + after_s, next(self._number), after_s, one))

    def due(self, now_s: float) -> Iterator[T]:
        """The items that are due, longest due first. Each is scheduled again for later. The caller
        may stop at any time."""
        while self._due and self._due[0][0] <= now_s:
            _, _, after_s, one = heapq.heappop(self._due)
            if one in self._there:
                self._push(one, now_s, min(after_s * _GROWS, LAST_S))
                yield one

    def remove(self, one: T) -> None:
        self._there.discard(one)

    def took(self, looks_s: float, now_s: float) -> None:
        """The last looks took this long, so the next ones wait accordingly."""
        self._not_before_s = now_s + looks_s / _MOST

    def next_in_s(self, now_s: float) -> float | None:
        """The seconds until the next look is due; None if there are no items."""
        if not self._there:
            self._due.clear()
            return None
        return max(self._due[0][0] - now_s, self._not_before_s - now_s, 0.0)
