"""When Python's garbage collector runs, and over which objects.

Objects that nobody refers to are freed at once; the collector only finds cycles. With a thousand
workers, a collection of all objects stops the loop for 20 ms and more, again and again while
workers start. It also writes to every page, and pages that are shared with forked workers are then
copied. But the objects of a worker form no cycle once the worker has ended. So whenever nothing is
under way, all objects are set aside (gc.freeze), and the collector skips them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

_SELDOM = 100
"""Ten times Python's own value: how seldom the oldest generation is collected."""
_EACH = 100
"""Objects of one worker."""
_MOST = 2
"""All objects are collected when this many times the expected number is set aside."""


class Garbage:
    """That of this process.

    Args:
        workers: how many there are.
    """

    def __init__(self, workers: Callable[[], int]) -> None:
        self._workers = workers
        # All that was imported stays.
        gc.freeze()
        self._at_first = self._counted = self._least = gc.get_freeze_count()
        self._added = 0
        self._young, self._old, _ = gc.get_threshold()
        gc.set_threshold(self._young, self._old, _SELDOM)
        gc.enable()

    def set_aside(self) -> None:
        """Set all objects aside. To be called while nothing is under way."""
        once, twice, thrice = gc.get_count()
        if not twice and not thrice:
            return  # there are too few new ones
        gc.collect(1)
        gc.freeze()
        # To count them takes 10 ms with a thousand workers.
        self._added += once + self._young * (twice + (self._old + 1) * thrice)
        if self._counted + self._added > self._most:
            self._count()
            if self._counted > self._most:
                gc.unfreeze()
                gc.collect()
                gc.freeze()
                self._count()
                self._least = self._counted

    @property
    def _most(self) -> int:
        return _MOST * max(self._least, self._at_first + _EACH * self._workers())

    def _count(self) -> None:
        self._counted, self._added = gc.get_freeze_count(), 0
