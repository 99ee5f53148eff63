"""Which slots of a service are taken, and which is the next. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from steer.errors import ControlError


class Slots:
    """The slots below a number. A slot is taken for a worker and given up once that is gone.

    Attributes:
        next: where the search for a free one begins.
    """

    def __init__(self, number: int) -> None:
        self.next = 0
        self._number = number
        self._taken: set[int] = set()

    def take(self) -> int:
        """A slot that nobody has, the next one round.

        Not one that was just given up: what still speaks of that means the worker that
        died.

        Raises:
            ControlError: all are taken.
        """
        taken = self._taken
        if len(taken) >= self._number:
            raise ControlError(
                "start a worker", f"all {self._number} slots are taken", "some still finish: wait"
            )
        while self.next in taken:
            self.next = (self.next + 1) % self._number
        slot = self.next
        self.next = (slot + 1) % self._number
        taken.add(slot)
        return slot

    def give_up(self, slot: int) -> None:
        self._taken.discard(slot)

    def restore(self, taken: Iterable[int], following: int) -> None:
        """Go on with what another controller left: those taken, and its `next`."""
        self._taken, self.next = set(taken), following

    @property
    def free(self) -> set[int]:
        return set(range(self._number)) - self._taken
