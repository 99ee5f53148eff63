"""Which slots of a service are taken, and which is the next. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from steer.errors import ControlError


class Slots:
    """The slots below a number. A slot is taken for a worker, and released when that is gone.

    Attributes:
        next: where the search for a free slot begins.
    """

    def __init__(self, number: int) -> None:
        self.next = 0
        self._number = number
        self._taken: set[int] = set()

    def take(self) -> int:
        """Take the next free slot, in turn.

        A slot that was just released is not taken again at once: log lines and counters may still
        refer to its former worker.

        Raises:
            ControlError: all slots are taken.
        """
        taken = self._taken
        if len(taken) >= self._number:
            raise ControlError(
                "start a worker",
                f"all {self._number} slots are taken",
                "wait until workers that are finishing have ended",
            )
        while self.next in taken:
            self.next = (self.next + 1) % self._number
        slot = self.next
        self.next = (slot + 1) % self._number
        taken.add(slot)
        return slot

    def release(self, slot: int) -> None:
        self._taken.discard(slot)

    def restore(self, taken: Iterable[int], following: int) -> None:
        """Continue with the slots that were taken under the previous controller, and its `next`."""
        self._taken, self.next = set(taken), following

    @property
    def free(self) -> set[int]:
        return set(range(self._number)) - self._taken
