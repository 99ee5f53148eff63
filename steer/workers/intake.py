"""How many workers to start at a time. Pure."""

from __future__ import annotations

QUICK_S = 0.1
"""Workers that are ready within this time take little CPU from those that serve."""
MOST_TOGETHER = 8
STEP_S = 0.02
"""The longest that a turn of the loop should take, as requests wait for it."""


class Batch:
    """How many workers to fork one right after the other, in one turn of the loop.

    A page that is written to between two forks is copied once more (fork(2), copy on write), which
    is most of the work if forks come one at a time. But the loop waits for the whole batch, and the
    forked processes compete with the controller for CPUs.

    Attributes:
        size: the number of workers in the next batch.
    """

    def __init__(self) -> None:
        self.size = MOST_TOGETHER

    def took(self, step_s: float) -> None:
        """Starting a lot took this long."""
        if step_s > STEP_S:
            self.size = max(1, self.size // 2)
        elif step_s <= STEP_S / 2:
            self.size = min(MOST_TOGETHER, self.size + 1)


class Intake:
    """How many workers to start while others serve.

    All at once would take the CPUs from workers that serve. So it is one more than half the CPUs:
    the next one starts while the last becomes ready. Workers that become ready quickly are started
    in batches.

    Args:
        cpus: the number of CPUs of this service.
        batch: limits the size of batches.
    """

    def __init__(self, cpus: int, batch: Batch) -> None:
        self._at_once = 1 + max(1, cpus // 2)
        self._batch = batch
        self._together = 1

    def room(self, starting: int) -> int:
        """How many workers to start now.

        Args:
            starting: how many are starting already.
        """
        together = min(self._together, self._batch.size)
        free = max(self._at_once, 2 * together) - starting
        return together if free >= together else 0

    def took(self, ready_s: float) -> None:
        """A worker became ready in this time."""
        if ready_s <= QUICK_S:
            self._together = min(MOST_TOGETHER, 2 * self._together)
        else:
            self._together = max(1, self._together // 2)
