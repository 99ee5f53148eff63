"""Where connections wait while there is no worker: listeners of the controller's own.

They are in the group like those of workers, but are chosen only while nobody else can be.
What waits there is moved to workers as soon as there are any; nothing is ever accepted.

There are two, as one is closed for a moment to move what waits at it. Should the last
worker die just then, the kernel finds the other, not none, and resets nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from steer import abi
from steer.config.address import Bind
from steer.config.service import Service
from steer.sockets import listeners, reuseport

COUNT = abi.RESERVES

Put = Callable[[int, int], None]
"""Puts a socket into the group's sockarray: from its place here, and a descriptor."""


class Reserve:
    """Of one group.

    Args:
        bound: called for each socket before it listens.
        put: called for each socket, and each time it listens anew.
    """

    def __init__(self, bound: Put, put: Put) -> None:
        self._bound = bound
        self._put = put
        self.sockets: list[socket.socket] = []

    def open(self, bind: Bind, service: Service) -> None:
        """Raises BindError, KernelError."""
        for place in range(COUNT):
            self.sockets.append(self._member(place, bind, service))
            self._put(place, self.sockets[place].fileno())

    def renew(self, bind: Bind, service: Service, gone: ExitStack) -> None:
        """Others in their place, with the backlog and options of another configuration.

        Args:
            gone: ends those that were there, which moves what waits at them.

        Raises:
            BindError, KernelError: some are as they were.
        """
        for place, old in enumerate(self.sockets):
            self.sockets[place] = self._member(place, bind, service)
            gone.callback(_end, old)
            self._put(place, self.sockets[place].fileno())

    def _member(self, place: int, bind: Bind, service: Service) -> socket.socket:
        bound = partial(self._bound, place)
        try:
            return reuseport.member(bind, service.backlog, bound, service.settings)
        except OSError as error:
            raise reuseport.bind_error(bind, error) from None

    def receive(self, fds: Sequence[int]) -> None:
        """Go on with those that another controller opened; the descriptors become ours."""
        self.sockets = [socket.socket(fileno=fd) for fd in fds]

    def empty(self) -> None:
        """Move what waits to whom the group's program chooses."""
        for place, sock in enumerate(self.sockets):
            if listeners.waiting(sock).queued:
                listeners.move_queue(sock)
                self._put(place, sock.fileno())

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.sockets = []


def _end(sock: socket.socket) -> None:
    """Closing is not enough: the guard has a duplicate."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
