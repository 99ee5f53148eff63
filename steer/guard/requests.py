"""Takes requests on a control socket while no controller does, as `control` does else.

Without an event loop of its own, as that is more than a keeper should weigh: it lives in
somebody's `selectors` loop, whose keys' data are called when they are ready.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from selectors import EVENT_READ, BaseSelector

import msgspec

from steer.control import peer
from steer.control.protocol import (
    BACKLOG,
    NOT_COMPLETE,
    REQUEST_MAX_BYTES,
    SILENT_MAX,
    TIMEOUT_S,
    TOO_LONG,
    Request,
    understood,
)

_CHUNK_BYTES = 16384
_PAUSE_S = 0.05
"""When no connection can be taken, before the next try."""


class Connection:
    """One connection, with one request."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self.since_s = time.monotonic()
        self.data = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pid(self) -> int:
        """Of who asks."""
        return peer.credentials(self._socket)[0]

    def says_something(self, end_s: float) -> bool:
        """Wait until then for more to read."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(max(0.0, end_s - time.monotonic()) * 1000))

    def read(self) -> bool:
        """Whether more may come."""
        try:
            data = self._socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        self.data += data
        return bool(data)

    def request(self) -> Request:
        """What it wants. Raises ValueError, as `understood` does."""
        line, end, _ = self.data.partition(b"\n")
        if len(line) > REQUEST_MAX_BYTES:
            raise ValueError(TOO_LONG)
        if not end:
            raise ValueError(NOT_COMPLETE)
        return understood(bytes(line), self._socket)

    def answer(self, answer: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        """And take leave. It is short: the empty buffer takes it all, if anybody is there."""
        with self._socket as sock, suppress(OSError):
            socket.send_fds(sock, [msgspec.json.encode(answer) + b"\n"], fds)


class StandbyServer:
    """Hands complete requests to `handle`, and keeps all others from doing harm.

    Args:
        control: listens; stays the caller's.
        handle: takes a request and the talk, to be answered now or later.
        refuse: makes an answer from the reason for a refusal.
    """

    def __init__(
        self,
        control: socket.socket,
        selector: BaseSelector,
        handle: Callable[[Request, Connection], None],
        refuse: Callable[[str], Mapping[str, object]],
    ) -> None:
        self._control = control
        self._selector = selector
        self._handle = handle
        self._refuse = refuse
        self._talks: dict[Connection, None] = {}
        self._listen()

    def _listen(self) -> None:
        self._control.setblocking(False)
        # Again, as now we are who is shown to be at the other end (unix(7), SO_PEERCRED).
        self._control.listen(BACKLOG)
        self._selector.register(self._control, EVENT_READ, self._on_connection)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """While it lasts no connection is taken; the descriptor may become another socket."""
        self._selector.unregister(self._control)
        try:
            yield
        finally:
            self._listen()

    @property
    def is_busy(self) -> bool:
        return bool(self._talks)

    def let_go(self) -> None:
        """Take leave of those that have been silent for too long."""
        limit_s = time.monotonic() - TIMEOUT_S
        for talk in [each for each in self._talks if each.since_s < limit_s]:
            self._finish(talk)

    def close(self, within_s: float) -> None:
        """Take no more connections; who has not asked yet may do so within that time."""
        self._selector.unregister(self._control)
        end_s = time.monotonic() + within_s
        for talk in list(self._talks):
            while talk in self._talks and talk.says_something(end_s):
                self._on_data(talk)
            if talk in self._talks:
                self._finish(talk)

    def _on_connection(self) -> None:
        if len(self._talks) >= SILENT_MAX:
            self._finish(next(iter(self._talks)))
        try:
            sock, _ = self._control.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor to be had, say
            time.sleep(_PAUSE_S)
            return
        talk = Connection(sock)
        self._talks[talk] = None
        self._selector.register(talk, EVENT_READ, lambda: self._on_data(talk))

    def _on_data(self, talk: Connection) -> None:
        more = talk.read()
        if not more or b"\n" in talk.data or len(talk.data) > REQUEST_MAX_BYTES:
            self._finish(talk)

    def _finish(self, talk: Connection) -> None:
        del self._talks[talk]
        self._selector.unregister(talk)
        try:
            request = talk.request()
        except ValueError as error:
            talk.answer(self._refuse(str(error)))
        else:
            self._handle(request, talk)
