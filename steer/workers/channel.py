"""The channel of a worker: it waits there for a byte before it runs anything, and says there why
it cannot load its application."""

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
    """Our end of it.

    Args:
        sock: becomes ours.

    Attributes:
        problem: what the worker said, or that it is not understood.
    """

    def __init__(self, sock: socket.socket, launch: Launch, readers: Readers) -> None:
        self.socket = sock
        self.problem: SteerError | None = None
        self._launch = launch
        self._readers = readers
        self._is_heard = False

    def go_on(self) -> None:
        """Let the worker run."""
        with suppress(OSError):  # it has ended, which is seen elsewhere
            self.socket.send(b"\0")

    def watch(self, misunderstood: Callable[[], object]) -> None:
        """Hear what the worker has to say.

        Args:
            misunderstood: called if it is no message.
        """
        self._readers.add(self.socket.fileno(), partial(self._on_readable, misunderstood))

    def close(self) -> None:
        """Hear no more."""
        self._readers.remove(self.socket.fileno())
        self.socket.close()

    def _on_readable(self, misunderstood: Callable[[], object]) -> None:
        if not self.hear():
            misunderstood()

    def hear(self) -> bool:
        """Take what the worker said; whether that is understood, if there was anything.

        It may be anything, as an application can write there, too. No descriptor is taken in:
        the kernel closes those that come along (unix(7): there is no room for them).
        """
        self.socket.setblocking(False)
        try:
            data = self.socket.recv(MESSAGE_MAX_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        self._readers.remove(self.socket.fileno())
        if self._is_heard or not data:
            return True
        self._is_heard = True
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
