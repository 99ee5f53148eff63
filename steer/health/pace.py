"""When to look at each of many that start: often at first, then less. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from itertools import count
from typing import Generic, TypeVar

FIRST_S, LAST_S = 0.01, 0.25
"""From one look to the next at first, and at last."""
_GROWS = 1.1
"""So that it is seen before a tenth more of its start has passed."""
_MOST = 0.2
"""Of the time may be spent on looks."""
T = TypeVar("T", bound=Hashable)


class Pace(Generic[T]):
    """Whom to look at, each at a pace of its own."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, float, T]] = []
        self._there: set[T] = set()
        self._number = count()
        self._not_before_s = 0.0

    def __len__(self) -> int:
        return len(self._there)

    def add(self, one: T, now_s: float, after_s: float = FIRST_S) -> None:
        """From now on, unless it is there already."""
        if one not in self._there:
            self._there.add(one)
            self._push(one, now_s, after_s)

    def _push(self, one: T, now_s: float, after_s: float) -> None:
        heapq.heappush(self._due, (now_s + after_s, next(self._number), after_s, one))

    def due(self, now_s: float) -> Iterator[T]:
        """Those that are to be looked at, longest due first: each is there again after it was
        looked at, for later. Whoever has seen enough stops here."""
        while self._due and self._due[0][0] <= now_s:
            _, _, after_s, one = heapq.heappop(self._due)
            if one in self._there:
                self._push(one, now_s, min(after_s * _GROWS, LAST_S))
                yield one

    def remove(self, one: T) -> None:
        self._there.discard(one)

    def took(self, looks_s: float, now_s: float) -> None:
        """So long for the looks just now: the next ones wait accordingly."""
        self._not_before_s = now_s + looks_s / _MOST

    def next_in_s(self, now_s: float) -> float | None:
        """After how long the next look is due; None if none is."""
        if not self._there:
            self._due.clear()
            return None
        return max(self._due[0][0] - now_s, self._not_before_s - now_s, 0.0)
