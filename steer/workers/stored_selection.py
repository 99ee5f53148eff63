"""What the guard stores of the selection, for a controller that adopts the service."""

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


class StoredSelection(msgspec.Struct, frozen=True):
    """The state of the backend, what was counted for released slots, and the next slot."""

    value: Any
    retired: Counts
    next_slot: int


class SelectionEntry:
    """The guard's entry of the selection, and when it is saved.

    Args:
        backend: returns the backend in force.
        counted: returns what was counted for released slots, and the next slot.
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
        """Use this event loop from here on."""
        self._loop = loop
        if self._is_due:
            loop.call_soon(self.save_if_due)

    def save(self) -> None:
        """Have the guard store the selection as it is now."""
        self._is_stored = True
        value, fds = self._backend().stored()
        saved = StoredSelection(value, *self._counted())
        self._guard.put(SELECTION, msgspec.json.encode(saved), fds)

    def save_unless_released(self) -> None:
        if not self._released:
            self.save()

    def save_soon(self) -> None:
        """Save once for all changes of this turn of the loop. If the controller is killed before,
        the service can still be adopted: taken slots are known from the workers, and which
        workers are selected is determined again."""
        if self._released:
            return
        if not self._is_stored:
            self.save()
        elif not self._is_due:
            self._is_due = True
            if self._loop is not None:  # else see `watch`
                self._loop.call_soon(self.save_if_due)

    def order_changed(self) -> None:
        """The order of sockets has changed. If the backend depends on it, save at once, as the
        order cannot be read back from the kernel; within `together`, save once at its end."""
        if self._backend().needs_order and not self._is_together and not self._released:
            self.save()
        else:
            self.save_soon()

    @contextmanager
    def together(self) -> Iterator[Mapping[int, int]]:
        """If the backend depends on the order of sockets, save the order once for all sockets that
        are added or removed in this context, and not once for each.

        The service can be adopted even if the controller is killed meanwhile:

        - Workers whose sockets are added are forked only after this context. Their sockets, the
          last in the order, are closed with the controller, and the stored order is right again.
        - The guard must have no sockets of workers that are removed. The adopting controller
          removes them from the stored order, from the first on, so they must be removed in that
          order here.
        - Sockets of the controller change their index as well, and the adopting controller must
          have them. So if there are any, each change is saved at once.

        Yields:
            The index in the stored order, by slot.
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
                self.save_if_due()

    def save_if_due(self) -> None:
        """Save now if the next turn of the loop would."""
        if not self._is_due:
            return
        self._is_due = False
        if not self._released:
            self._retry.until_done("save the selection", self.save)

    def release(self) -> None:
        """The service stops: nothing is left to adopt."""
        self._released = True
        self._guard.drop(SELECTION)
