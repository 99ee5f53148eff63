"""The channel between controller and worker.

A worker waits for a byte on it before it runs anything. If it cannot load its application, it sends
the reason.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from steer.child.launch import MESSAGE_MAX_BYTES, Launch, read
from steer.errors import AppLoadError, SteerError, WorkersFailed
from steer.values import Invalid
from steer.workers.readers import Readers


class WorkerChannel:
    """The controller's end of the channel of one worker.

    Args:
        sock: `close` closes it.

    Attributes:
        problem: why the application cannot be loaded, or that the message is not valid.
    """

    def __init__(self, sock: socket.socket, launch: Launch, readers: Readers) -> None:
        self.socket = sock
        self.problem: SteerError | None = None
        self._launch = launch
        self._readers = readers
        self._is_received = False

    def go_on(self) -> None:
        """Let the worker run."""
        with suppress(OSError):  # the worker has ended, which `Ends` handles
            self.socket.send(b"\0")

    def watch(self, misunderstood: Callable[[], object]) -> None:
        """Receive a message of the worker once there is one.

        Args:
            misunderstood: called if the message is not valid.
        """
        self._readers.add(self.socket.fileno(), partial(self._on_readable, misunderstood))

    def close(self) -> None:
        """Receive nothing more."""
        self._readers.remove(self.socket.fileno())
        self.socket.close()

    def _on_readable(self, misunderstood: Callable[[], object]) -> None:
        if not self.receive():
            misunderstood()

    def receive(self) -> bool:
        """Receive the message of the worker, if there is one; return False if it is not valid.

        An application can write to the channel too, so the message may be anything. Descriptors
        that come with it are closed by the kernel, as recv(2) leaves no room for them (unix(7)).
        """
        self.socket.setblocking(False)
        try:
            data = self.socket.recv(MESSAGE_MAX_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        self._readers.remove(self.socket.fileno())
        if self._is_received or not data:
            return True
        self._is_received = True
        try:
            message = read(data)
        except Invalid as error:
            what = f"worker {self._launch.slot} sent what steer does not understand"
            self.problem = WorkersFailed(what, str(error), "it is replaced")
            return False
        app = self._launch.service.app
        what = f"load {app}" if app else f"start {self._launch.name}"
        self.problem = AppLoadError(what, message.unloadable, detail=message.detail)
        return True
