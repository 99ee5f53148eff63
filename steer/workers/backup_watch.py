"""Migrates connections that come to backup listeners while there are workers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from steer.backends.base import ControllerSockets
from steer.linux.retry import Retry
from steer.sockets import listeners
from steer.workers.publisher import Publisher

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

_AGAIN_S = 0.1
_ACT = "move what waits at backup listeners"


class BackupWatch:
    """Watches the backup listeners. A connection whose handshake began while there was no worker
    arrives late, and is migrated at once if there is a worker now; otherwise it waits.

    Args:
        backend: returns the backend in force.
        some_serve: whether there is a worker to move it to.
        attach_again: attaches what is in force to every group.
    """

    def __init__(
        self,
        backend: Callable[[], ControllerSockets],
        some_serve: Callable[[], bool],
        attach_again: Callable[[], None],
        publisher: Publisher,
        retry: Retry,
    ) -> None:
        self._backend = backend
        self._some_serve = some_serve
        self._attach_again = attach_again
        self._publisher = publisher
        self._retry = retry
        self._released = False
        self._loop: AbstractEventLoop | None = None

    def watch(self, loop: AbstractEventLoop) -> None:
        """Use this event loop from here on."""
        self._loop = loop

    @property
    def _sockets(self) -> Sequence[socket.socket]:
        backup = self._backend().backup
        return backup.sockets if backup else ()

    def follow(self, some_serve: bool) -> None:
        """Migrate what comes, if there are workers."""
        assert self._loop
        for sock in self._sockets:
            if some_serve:
                self._loop.add_reader(sock, self._empty)
            else:
                self._loop.remove_reader(sock)

    def pause(self) -> None:
        """Migrate nothing until `go_on` or `follow` is called."""
        self.follow(False)

    def go_on(self) -> None:
        if not self._released:
            self.follow(self._some_serve())

    def _empty(self) -> None:
        """Migrate what waits, once the table is synchronized.

        The program is attached again before, as a process may have replaced or detached it: without
        it, migrated connections would be reset. Connections that come back wait a moment: the table
        may still have a worker that was told to finish by others, and has closed its listeners.
        """
        self._retry.attempt("attach the policy's program again", self._attach_again)
        # Nothing must be on its way to the listener, as it does not listen while it is emptied.
        self.pause()
        self._publisher.when_synchronized(_ACT, self._empty_backup)

    def _empty_backup(self) -> None:
        if self._released:
            return
        backup = self._backend().backup
        moved = not backup or self._retry.attempt(_ACT, backup.empty)
        if not moved or any(map(listeners.is_waited_for, self._sockets)):
            assert self._loop
            self._loop.call_later(_AGAIN_S, self.go_on)
        else:
            self.go_on()

    def release(self) -> None:
        """The service stops."""
        self._released = True
        self.pause()
