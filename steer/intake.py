"""How many workers to start at a time while others serve. Pure."""

from __future__ import annotations

QUICK_S = 0.1
"""Whoever is ready so soon takes little from those that serve."""
MOST_TOGETHER = 8
"""So many forks take some 10 ms, for which the loop waits."""


class Intake:
    """Not all at once: they would take the CPUs from those that serve. One more than half the
    CPUs, so that the next begins while the last gets ready.

    Those who get ready quickly are started several together: a page that we write to between two
    forks is copied for each of them once more (fork(2), copy on write), and with one fork at a
    time that is most of the work.

    Args:
        cpus: for this service.
    """

    def __init__(self, cpus: int) -> None:
        self._at_once = 1 + max(1, cpus // 2)
        self._together = 1

    def room(self, starting: int) -> int:
        """How many more to start now, while so many are not ready yet."""
        free = max(self._at_once, 2 * self._together) - starting
        return self._together if free >= self._together else 0

    def took(self, ready_s: float) -> None:
        """So long it took one to get ready."""
        if ready_s <= QUICK_S:
            self._together = min(MOST_TOGETHER, 2 * self._together)
        else:
            self._together = max(1, self._together // 2)
