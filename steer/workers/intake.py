"""How many workers to start at a time. Pure."""

from __future__ import annotations

QUICK_S = 0.1
"""Whoever is ready so soon takes little from those that serve."""
MOST_TOGETHER = 8
STEP_S = 0.02
"""So long a turn of the loop may take: who asks something meanwhile waits for it."""


class Lot:
    """How many workers to fork one right after the other, in one turn of the loop.

    A page that we write to between two forks is copied for each of them once more (fork(2), copy
    on write): with one fork at a time that is most of the work. But the loop waits for all of a
    lot, and where CPUs are scarce what was just forked takes them from us.

    Attributes:
        size: how many now.
    """

    def __init__(self) -> None:
        self.size = MOST_TOGETHER

    def took(self, step_s: float) -> None:
        """So long a lot took."""
        if step_s > STEP_S:
            self.size = max(1, self.size // 2)
        elif step_s <= STEP_S / 2:
            self.size = min(MOST_TOGETHER, self.size + 1)


class Intake:
    """How many workers to start while others serve.

    Not all at once: they would take the CPUs from those that serve. One more than half the
    CPUs, so that the next begins while the last gets ready. Those who get ready quickly are
    started in lots.

    Args:
        cpus: for this service.
        lot: bounds the lots.
    """

    def __init__(self, cpus: int, lot: Lot) -> None:
        self._at_once = 1 + max(1, cpus // 2)
        self._lot = lot
        self._together = 1

    def room(self, starting: int) -> int:
        """How many more to start now, while so many are not ready yet."""
        together = min(self._together, self._lot.size)
        free = max(self._at_once, 2 * together) - starting
        return together if free >= together else 0

    def took(self, ready_s: float) -> None:
        """So long it took one to get ready."""
        if ready_s <= QUICK_S:
            self._together = min(MOST_TOGETHER, 2 * self._together)
        else:
            self._together = max(1, self._together // 2)
