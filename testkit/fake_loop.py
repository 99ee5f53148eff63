"""A loop and its time for pure tests: nothing happens but what is due, and takes what it says."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Handle:
    is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Loop:
    """A time, and what is due in it.

    Attributes:
        steps_s: how long each call took.
    """

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.steps_s: list[float] = []
        self._due: list[tuple[float, int, Handle, Callable[..., object], tuple[object, ...]]] = []
        self._number = count()

    def read_s(self) -> float:
        return self.now_s

    def take_s(self, seconds: float) -> None:
        self.now_s += seconds

    def call_later(self, delay: float, callback: Callable[..., object], *args: object) -> Handle:
        handle = Handle()
        due = (self.now_s + delay, next(self._number), handle, callback, args)
        heapq.heappush(self._due, due)
        return handle

    def run_s(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self._due and self._due[0][0] <= end_s:
            due_s, _, handle, callback, args = heapq.heappop(self._due)
            self.now_s = began_s = max(self.now_s, due_s)
            if not handle.is_cancelled:
                callback(*args)
                self.steps_s.append(self.now_s - began_s)
        self.now_s = max(self.now_s, end_s)
