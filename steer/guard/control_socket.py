"""Makes the control socket again if its path was removed while there is no controller."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path

from steer.control.claim import Claim
from steer.control.record import Record, Worker
from steer.errors import ControlError
from steer.guard.store import FdStore

_LOOK_S = 2.0
"""How often to check that the control socket still has its path."""


class ControlSocket:
    """The path of the control socket, and the record of workers beside it. A logout may remove a
    runtime directory with all its files. Without the socket no command could reach the service.

    Args:
        control: the listening control socket.
        elsewhere: a context in which no connection is taken at the socket.
        say: logs a line.
    """

    def __init__(
        self,
        store: FdStore,
        control: socket.socket,
        elsewhere: Callable[[], AbstractContextManager[None]],
        say: Callable[[str], None],
    ) -> None:
        settings = store.settings
        self._store = store
        self._claim = Claim.inherited(Path(settings.control), control, settings.remove_directory)
        self._record = Record(self._claim.path)
        self._elsewhere = elsewhere
        self._say = say
        self._due_s = time.monotonic()
        self._is_lost = False

    @property
    def remaining_s(self) -> float:
        """The time until the next check."""
        return self._due_s - time.monotonic()

    def look(self, workers: Collection[Worker]) -> None:
        """Make the socket and the record again if they were removed."""
        if not self._claim.is_there:
            self._make_again()
        if not self._record.is_there:
            self._record.renew(workers)

    def postpone(self) -> None:
        """Let some time pass until the next check."""
        self._due_s = time.monotonic() + _LOOK_S

    def _make_again(self) -> None:
        before, settings = self._claim.path, self._store.settings
        wanted = None if settings.remove_directory else settings.control
        try:
            with self._elsewhere():
                self._claim.renew(settings.name, wanted, os.environ)
        except ControlError as error:
            if not self._is_lost:
                self._say(f"the guard: make the control socket again: {error}; it is tried again")
            self._is_lost = True
            return
        self._is_lost = False
        self._store.relocated(self._claim.path)
        self._record = Record(self._claim.path)
        self._say(f"control socket {before} was removed; now it is {self._claim.path}")
