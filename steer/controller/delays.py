"""Measures how long the turns of the controller's loop take.

A request that arrives during a turn waits until the turn ends, so the duration of a turn is the
longest delay of that request. A turn lasts from the return of one poll of descriptors and timers to
the next poll. So no timer is needed, and an idle loop costs nothing.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from bisect import bisect_right
from collections.abc import Callable

from steer.control.schema import LoopDelay

BOUNDS_MS = (0.0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""The lower bounds of the buckets."""
_BOUNDS_S = tuple(each / 1000 for each in BOUNDS_MS)


class Delays:
    """A histogram of durations."""

    def __init__(self) -> None:
        self._counts = [0] * len(BOUNDS_MS)
        self._max_s = 0.0

    def add(self, delay_s: float) -> None:
        """Count a duration."""
        self._counts[bisect_right(_BOUNDS_S, delay_s) - 1] += 1
        if delay_s > self._max_s:
            self._max_s = delay_s

    def report(self) -> LoopDelay:
        """The durations that were counted so far."""
        return LoopDelay(
            buckets=list(zip(BOUNDS_MS, self._counts, strict=True)),
            count=sum(self._counts),
            max=round(self._max_s * 1000, 3),
            p50=self._at_most_ms(0.5),
            p99=self._at_most_ms(0.99),
            p99_9=self._at_most_ms(0.999),
        )

    def _at_most_ms(self, share: float) -> float:
        """A percentile, rounded up to the end of a bucket, but not above the longest duration.

        Args:
            share: the share of the durations, from 0 to 1.
        """
        max_ms = round(self._max_s * 1000, 3)
        below, count = 0, sum(self._counts)
        for end_ms, here in zip((*BOUNDS_MS[1:], max_ms), self._counts, strict=True):
            below += here
            if below >= share * count:
                return min(end_ms, max_ms)
        return max_ms


class _Timed(selectors.DefaultSelector):
    """A selector that measures the time between its calls."""

    def __init__(self, delays: Delays, now_s: Callable[[], float]) -> None:
        super().__init__()
        self._delays = delays
        self._now_s = now_s
        self._began_s: float | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self._began_s is not None:
            self._delays.add(self._now_s() - self._began_s)
        found = super().select(timeout)
        self._began_s = self._now_s()
        return found


def timed_loop(
    delays: Delays, now_s: Callable[[], float] = time.monotonic
) -> asyncio.AbstractEventLoop:
    """An event loop that counts the duration of each of its turns."""
    return asyncio.SelectorEventLoop(_Timed(delays, now_s))
