"""When Python looks for garbage, and among what.

What nobody refers to any more is freed at once; looked for are only cycles of objects that refer to
each other. With a thousand workers such a look at all that is there keeps the loop for 20 ms and
more, again and again while workers start, and writes to each page, which is then copied, as
workers were forked from us and share it. But what there is of a worker has no cycles once that
has ended. So whatever is there while nothing is under way is set aside, and nothing is looked
for among it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

_SELDOM = 100
"""Ten times what is usual: how often what was looked at twice is looked at again."""
_EACH = 100
"""Objects that there are of a worker."""
_MOST = 2
"""So many times what there should be may be set aside, before it is all looked at."""


class Garbage:
    """Of this process.

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
        """To be called while nothing is under way: what is there now is to stay, or to be freed
        when nobody refers to it."""
        once, twice, thrice = gc.get_count()
        if not twice and not thrice:
            return  # too little has come since the last time
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
