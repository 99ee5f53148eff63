"""Adoption, on the side of the guard process: everything is handed over, or it carries on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from selectors import EVENT_READ, BaseSelector

import msgspec

from steer.guard.channel import Channel, Frame
from steer.guard.requests import Connection
from steer.guard.store import PATIENCE_S, FdStore


class Adoption:
    """Hands everything to a controller that asks, one at a time.

    Args:
        control: the listening control socket.
        leave: called before anything is handed over.
        carry_on: called when the controller has gone without having taken it.

    Attributes:
        pid: of the last controller that asked.
        is_done: whether it has taken everything.
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

    def begin(self, asked: Connection) -> None:
        """Hand it over to who asked."""
        ours, theirs = socket.socketpair()
        self.pid = asked.pid
        self._leave()
        with theirs:
            asked.answer({"ok": True, "pid": os.getpid()}, [theirs.fileno()])
        ours.settimeout(PATIENCE_S)
        self._channel = Channel(ours)
        try:
            self._send_all(self._channel)
        except OSError:
            self._give_up()
        else:
            ours.setblocking(False)
            self._selector.register(ours, EVENT_READ, self._on_answer)

    def _send_all(self, channel: Channel) -> None:
        """The control socket last. Raises OSError."""
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
        except OSError:  # it has gone, or says what is not understood
            self.is_done = False
        self._selector.unregister(self._channel.fileno())
        if not self.is_done:
            self._give_up()

    def _give_up(self) -> None:
        assert self._channel is not None
        self._channel.close()
        self._channel = None
        self._carry_on()
