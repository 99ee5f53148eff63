"""The worker object that a Python callable gets."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress

from steer.child.launch import Launch

SIGNAL_EVERY_S = 0.05


class Worker:
    """The argument of a Python callable.

    Attributes:
        sockets: bound sockets, one for each bind, in the order of the binds; TCP sockets listen.
        slot: the number of the worker in its service.
        cpus: the CPUs that the worker may run on.
        name: the name of the service.
        generation: the number of the generation that the worker belongs to.
        stop_signals: the signals that tell the worker to finish, for servers that handle them.
        watchdog_s: the worker has to call `beat` at least once in this time; None: no limit.
    """

    def __init__(self, launch: Launch, sockets: Sequence[socket.socket]) -> None:
        self.sockets = tuple(sockets)
        self.slot = launch.slot
        self.cpus = launch.spec.cpus
        self.name = launch.name
        self.generation = launch.generation
        self.stop_signals = frozenset((signal.SIGTERM, launch.service.finish_signal))
        self.watchdog_s = launch.service.watchdog
        self._notify = launch.notify
        self._stopping = False
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in self.stop_signals:
            signal.signal(number, self._stop)

    @property
    def stopping(self) -> bool:
        """Whether the worker was told to finish (SIGTERM, `--stop-signal`)."""
        return self._stopping

    def ready(self) -> None:
        """Tell the controller that this worker can serve. This is optional: steer also notices that
        a worker waits on its sockets."""
        self._notify_controller(b"READY=1")

    def beat(self) -> None:
        """Tell the controller that this worker makes progress: at least once every `watchdog_s`,
        if that is set."""
        self._notify_controller(b"WATCHDOG=1")

    def replace(self) -> None:
        """Ask the controller to start another worker in place of this one, for example after a
        number of requests. Serve until `stopping`: first the other worker becomes ready. The
        controller that is asked may be gone by then, so ask again after a while."""
        self._notify_controller(b"X_STEER_REPLACE=1")

    def _notify_controller(self, message: bytes) -> None:
        """Notify the controller without waiting, as there may be no controller for a while."""
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender,
        ):
            sender.sendto(message, "\0" + self._notify[1:])

    def _stop(self, _number: int, _frame: object) -> None:
        """Note that the worker is stopping, and make its sockets non-blocking: a loop of accept()
        takes the connections in the queue, then ends with BlockingIOError."""
        self._stopping = True
        for sock in self.sockets:
            with suppress(OSError):  # the application may have closed it by its number
                os.set_blocking(sock.fileno(), False)
        # A signal right before accept() does not interrupt it, so send more signals.
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, SIGNAL_EVERY_S, SIGNAL_EVERY_S)
