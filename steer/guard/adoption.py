"""Adoption on the side of the guard process: it hands over everything, or continues as before."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from selectors import EVENT_READ, BaseSelector

import msgspec

from steer.guard.channel import Channel, Frame
from steer.guard.requests import Connection
from steer.guard.store import PEER_TIMEOUT_S, FdStore


class Adoption:
    """Hands everything over to a controller that requests it; to one controller at a time.

    Args:
        control: the listening control socket.
        leave: called before anything is handed over.
        carry_on: called if the controller ends before it has everything.

    Attributes:
        pid: the process ID of the last controller that requested an adoption.
        is_done: whether that controller has everything.
    """

    def __init__(
        self,
        store: FdStore,
        control: socket.socket,
        selector: BaseSelector,
        leave: Callable[[], None],
        carry_on: Callable[[], None],
    ) -> None:
        self.pid = 0
        self.is_done = False
        self._store = store
        self._control = control
        self._selector = selector
        self._leave = leave
        self._carry_on = carry_on
        self._channel: Channel | None = None

    @property
    def is_under_way(self) -> bool:
        return self._channel is not None

    def begin(self, client: Connection) -> None:
        """Hand everything over to the controller at the other end of the connection."""
        ours, theirs = socket.socketpair()
        self.pid = client.pid
        self._leave()
        with theirs:
            client.answer({"ok": True, "pid": os.getpid()}, [theirs.fileno()])
        ours.settimeout(PEER_TIMEOUT_S)
        self._channel = Channel(ours)
        try:
            self._send_all(self._channel)
        except OSError:
            self._give_up()
        else:
            ours.setblocking(False)
            self._selector.register(ours, EVENT_READ, self._on_answer)

    def _send_all(self, channel: Channel) -> None:
        """Send everything, the control socket last. Raises OSError."""
        settings = msgspec.msgpack.encode(self._store.settings)
        channel.send(Frame("configure", value=settings))
        for key, entry in self._store.entries.items():
            count, number = len(entry.fds), entry.stop_signal
            frame = Frame("put", key, entry.value, count, entry.group, stop_signal=number)
            channel.send(frame, entry.fds)
        channel.send(Frame("control", fds=1), [self._control.fileno()])

    def _on_answer(self) -> None:
        assert self._channel is not None
        try:
            self.is_done = self._channel.receive() is not None
        except BlockingIOError:
            return
        except OSError:  # the controller has ended, or its answer is no frame
            self.is_done = False
        self._selector.unregister(self._channel.fileno())
        if not self.is_done:
            self._give_up()

    def _give_up(self) -> None:
        assert self._channel is not None
        self._channel.close()
        self._channel = None
        self._carry_on()
