"""Moves on what comes to backup listeners while there are workers."""

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
    """What gets there late, as its handshake began when there was no worker, is moved on at once;
    while there is still none, it waits.

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
        """From here on there is a loop."""
        self._loop = loop

    @property
    def _sockets(self) -> Sequence[socket.socket]:
        backup = self._backend().backup
        return backup.sockets if backup else ()

    def follow(self, some_serve: bool) -> None:
        """Move what comes, if there are workers."""
        assert self._loop
        for sock in self._sockets:
            if some_serve:
                self._loop.add_reader(sock, self._empty)
            else:
                self._loop.remove_reader(sock)

    def pause(self) -> None:
        """Move nothing, until `go_on` or `follow`."""
        self.follow(False)

    def go_on(self) -> None:
        if not self._released:
            self.follow(self._some_serve())

    def _empty(self) -> None:
        """What came back waits a moment: a worker that was told to end by others has closed its
        listeners, and is in the table until it has finished what it has.

        Or the group has another program than ours, or none, as a process may have done that: by
        ours what waits is moved, by any other it would be reset.
        """
        self._retry.attempt("attach the policy's program again", self._attach_again)
        # By then nothing is on its way there: while it is emptied it does not listen.
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
        """The service ends."""
        self._released = True
        self.pause()
