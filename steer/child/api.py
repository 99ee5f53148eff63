"""What a Python callable is given: its sockets, and ways to tell the controller of itself."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress

from steer.child.launch import Launch

KNOCK_S = 0.05


class Worker:
    """What a Python callable is given.

    Attributes:
        sockets: bound sockets, one for each bind and in their order; over TCP they listen.
        slot: the worker's number in its service.
        cpus: CPUs it may run on.
        name: the service's.
        generation: of the configuration it was started from.
        watchdog_s: within which it has to `beat`; None: it need not.
    """

    def __init__(self, launch: Launch, own: Sequence[socket.socket]) -> None:
        self.sockets = tuple(own)
        self.slot = launch.slot
        self.cpus = launch.spec.cpus
        self.name = launch.name
        self.generation = launch.generation
        self.watchdog_s = launch.service.watchdog
        self._notify = launch.notify
        self._stopping = False
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGTERM, launch.service.told_by):
            signal.signal(number, self._stop)

    @property
    def stopping(self) -> bool:
        """Whether the worker was told to finish (SIGTERM, `--stop-signal`)."""
        return self._stopping

    def ready(self) -> None:
        """Tell the controller that connections may come; not needed by those that
        wait on their socket once they are."""
        self._tell(b"READY=1")

    def beat(self) -> None:
        """Tell the controller that all is well: within every `watchdog_s`, if that is set."""
        self._tell(b"WATCHDOG=1")

    def _tell(self, message: bytes) -> None:
        """Nobody may be there for a while, or not take it at once: it is not waited for."""
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender,
        ):
            sender.sendto(message, "\0" + self._notify[1:])

    def _stop(self, _number: int, _frame: object) -> None:
        """From here on a socket does not wait: a loop of accept() takes what is
        queued, then gets BlockingIOError and so ends."""
        self._stopping = True
        for sock in self.sockets:
            with suppress(OSError):  # the application may have closed it by its number
                os.set_blocking(sock.fileno(), False)
        # A signal that comes just before accept() does not interrupt it: knock again.
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, KNOCK_S, KNOCK_S)
