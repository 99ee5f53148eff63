"""What the guard stores of the selection, so that another controller can go on with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from steer.backends.base import Backend, Counts
from steer.guard.client import GuardClient
from steer.guard.store import SELECTION
from steer.linux.retry import Retry

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop


class SavedSelection(msgspec.Struct, frozen=True):
    """The backend, what was counted, and the next slot, as another controller left them."""

    value: Any
    retired: Counts
    next_slot: int


class StoredSelection:
    """The guard's entry of the selection, and when it is renewed.

    Args:
        backend: returns the backend in force.
        counted: returns what was counted for slots since given up, and the next slot.
    """

    def __init__(
        self,
        backend: Callable[[], Backend],
        counted: Callable[[], tuple[Counts, int]],
        guard: GuardClient,
        retry: Retry,
    ) -> None:
        self._backend = backend
        self._counted = counted
        self._guard = guard
        self._retry = retry
        self._is_due = self._is_stored = self._is_together = False
        self._released = False
        self._loop: AbstractEventLoop | None = None

    def watch(self, loop: AbstractEventLoop) -> None:
        """From here on there is a loop."""
        self._loop = loop
        if self._is_due:
            loop.call_soon(self.renew_if_due)

    def renew(self) -> None:
        """Have the guard store it as it is now."""
        self._is_stored = True
        value, fds = self._backend().stored()
        saved = SavedSelection(value, *self._counted())
        self._guard.put(SELECTION, msgspec.json.encode(saved), fds)

    def renew_unless_released(self) -> None:
        if not self._released:
            self.renew()

    def renew_soon(self) -> None:
        """Once for all that changes in one turn of the loop. A controller that is killed meanwhile
        leaves what can be adopted all the same: a slot that was taken is not taken again, as its
        worker is known, and who is selected is found out again."""
        if self._released:
            return
        if not self._is_stored:
            self.renew()
        elif not self._is_due:
            self._is_due = True
            if self._loop is not None:  # else see `watch`
                self._loop.call_soon(self.renew_if_due)

    def order_changed(self) -> None:
        """Renew it at once where the order of sockets matters, or see `together`: in which order
        the kernel has sockets nobody else can tell."""
        if self._backend().needs_order and not self._is_together and not self._released:
            self.renew()
        else:
            self.renew_soon()

    @contextmanager
    def together(self) -> Iterator[Mapping[int, int]]:
        """Where the order of sockets matters the guard is told it once for all who join, or
        leave, meanwhile, and not once for each: it is told that of all others, too.

        A controller that is killed meanwhile leaves what can be adopted. Those who join are not
        forked before the end: their sockets, the last in the order, go with the controller, and
        what the guard knows is right again. Of those who leave it must have no sockets any more:
        who adopts takes them out of the order that it knows, from the first on, and so they are
        to leave. But sockets of our own move as well, and who adopts has to have them: where
        there are any, each change is told at once.

        Yields:
            by slot, the index in the order that the guard knows.
        """
        backend = self._backend()
        knows = backend.needs_order and not backend.controller_sockets
        order = backend.order if knows else None
        self._is_together = order is not None
        try:
            yield {slot: index for index, slot in enumerate(order or ())}
        finally:
            if self._is_together:
                self._is_together = False
                self.renew_if_due()

    def renew_if_due(self) -> None:
        """Do not wait for the next turn of the loop: there may be none."""
        if not self._is_due:
            return
        self._is_due = False
        if not self._released:
            self._retry.until_done("have the guard know who is chosen", self.renew)

    def release(self) -> None:
        """The service ends: nobody is to adopt this."""
        self._released = True
        self._guard.drop(SELECTION)
