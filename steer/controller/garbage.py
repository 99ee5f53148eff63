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

_THRESHOLD_OLDEST = 100
"""How many collections of the middle generation come before one of the oldest; Python's default is
10."""
_OBJECTS_PER_WORKER = 100
_MAX_FACTOR = 2
"""All objects are collected when this many times the expected number is set aside."""


class Garbage:
    """The garbage collection of this process.

    Args:
        workers: returns how many workers there are.
    """

    def __init__(self, workers: Callable[[], int]) -> None:
        self._workers = workers
        # Imported modules are never freed.
        gc.freeze()
        self._at_first = self._counted = self._least = gc.get_freeze_count()
        self._added = 0
        self._young, self._old, _ = gc.get_threshold()
        gc.set_threshold(self._young, self._old, _THRESHOLD_OLDEST)
        gc.enable()

    def set_aside(self) -> None:
        """Set all objects aside. Call it while no request or change is under way."""
        once, twice, thrice = gc.get_count()
        if not twice and not thrice:
            return  # too few new objects
        gc.collect(1)
        gc.freeze()
        # An estimate, because get_freeze_count() takes 10 ms with a thousand workers.
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
        expected = self._at_first + _OBJECTS_PER_WORKER * self._workers()
        return _MAX_FACTOR * max(self._least, expected)

    def _count(self) -> None:
        self._counted, self._added = gc.get_freeze_count(), 0
