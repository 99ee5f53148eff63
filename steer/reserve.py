"""Where connections wait while there is no worker: listeners of the controller's own.

They are in the group like those of workers, but are chosen only while nobody else can be.
What waits there is moved to workers as soon as there are any; nothing is ever accepted.

There are two, as one is closed for a moment to move what waits at it. Should the last
worker die just then, the kernel finds the other, not none, and resets nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial

from steer import abi
from steer.address import Bind
from steer.kernel import listeners, sockets

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

    def open(self, bind: Bind, backlog: int) -> None:
        """Raises BindError, KernelError."""
        for place in range(COUNT):
            try:
                bound = partial(self._bound, place)
                self.sockets.append(sockets.member(bind, backlog, bound))
            except OSError as error:
                raise sockets.bind_error(bind, error) from None
            self._put(place, self.sockets[place].fileno())

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
